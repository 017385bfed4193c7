"""Whether an image shows what a text says, by CLIP (Radford et al. 2021; Hessel et al. 2021)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import pretrained, text_encoder
from eval.measure.pretrained import BATCH, pixels

Agreement = Callable[[Tensor, Sequence[str]], Tensor]
"""(uint8 images (B, C, H, W), a text for each) -> (B,), higher for images that fit their texts."""


def clip_score(choices: Sequence[str], device: torch.device) -> Agreement | None:
    """The score by the first clip:FOLDER among --features that reads texts too; None without one.

    100 times the cosine of the image's embedding and the text's, at least 0.
    """
    folders = [Path(each.partition(":")[2]) for each in choices if each.startswith("clip:")]
    folder = next((each for each in folders if text_encoder.has_tokenizer(each)), None)
    if folder is None:
        return None
    model = pretrained.network(folder, "CLIPModel", "CLIP's scores").to(device)
    tokenizer = text_encoder.tokenizer_of(folder, pretrained.transformers("CLIP's scores"))
    prepare = pixels(f"clip:{folder}", model.config.vision_config.image_size, device)
    most = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images: Tensor, texts: Sequence[str]) -> Tensor:
        scores = [torch.zeros(0, device=device)]
        if not len(images):
            return scores[0]
        for part, start in zip(images.split(BATCH), range(0, len(images), BATCH), strict=True):
            tokens = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=most,
                return_tensors="pt",
            ).to(device)
            both = model(pixel_values=prepare(part), **tokens)
            scores.append(100 * F.cosine_similarity(both.image_embeds, both.text_embeds).clamp(0))
        return torch.cat(scores)

    return score
