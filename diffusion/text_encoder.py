"""Text encoders: a folder of Hugging Face's transformers, which makes token embeddings of texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import pretrained
from diffusion.checkpoint import weights_sha256
from diffusion.condition import Text
from diffusion.console import UserError, first_line, say, track
from diffusion.machine import this_device

MOST_TOKENS = 77  # of a text, as CLIP has them: what is longer is cut
BATCH = 64
PURPOSE = "texts"
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)  # one of which is in a tokenizer's folder
POOLER = "pooler"  # a part that many encoders have, some lack, and nothing here reads


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """Texts -> their tokens' embeddings, the network's last hidden state."""

    name: str
    """The last two parts of its folder's path."""
    sha256: str
    """Identity of its weights and its vocabulary."""
    width: int
    """Numbers in an embedding."""
    most: int
    """Tokens of a text that are read, at most."""
    tokenizer: Any
    network: Any
    whole: bool = False
    """Whether what fills a text up to `most` tokens is embedded as any token is: in a pipeline's
    folder, whose network was trained on such texts (Rombach et al. 2022)."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, its beginning and its end among them."""
        return [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]] if texts else []

    def tokens(self, texts: Sequence[str]) -> int:
        """How many tokens a table of these texts has room for."""
        return self.most if self.whole else min(self.most, max(self.lengths(texts)))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], tokens: int) -> Tensor:
        """(N, tokens, D) float16 on the CPU: a longer text is cut, a shorter one ends in zeros.

        float16, as a training's cache keeps them: a caption and the same prompt are one text.
        """
        embeddings = torch.zeros(len(texts), tokens, self.width, dtype=torch.float16)
        lengths = self.lengths(texts)
        order = sorted(range(len(texts)), key=lengths.__getitem__)  # little padding in a batch
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        done = track(
            enumerate(batches), "texts", lambda item: (item[0] + 1, len(batches), "batches")
        )
        for _, numbers in done if len(batches) > 1 else enumerate(batches):
            batch = self.tokenizer(
                [texts[i] for i in numbers],
                padding="max_length" if self.whole else True,
                truncation=True,
                max_length=tokens,
                return_tensors="pt",
            ).to(self.network.device)
            tokens_alone = batch["attention_mask"]
            if self.whole and not getattr(self.network.config, "use_attention_mask", False):
                del batch["attention_mask"]  # as diffusers' pipelines call it
            hidden = self.network(**batch).last_hidden_state.float()
            if not self.whole:
                hidden = hidden * tokens_alone[..., None]
            limit = torch.finfo(torch.float16).max
            embeddings[numbers, : hidden.shape[1]] = hidden.clamp(-limit, limit).half().cpu()
        return embeddings

    def prompts(self, texts: Sequence[str], kind: Text) -> Tensor:
        """(N, L, D) float32, as the kind of a model's texts has them; "" says nothing.

        UserError where the model's texts were made by another encoder.
        """
        if self.sha256 != kind.sha256:
            raise UserError(
                f"the model's texts were encoded by {kind.encoder} (sha256 {kind.sha256[:8]}), "
                f"and {self.name} (sha256 {self.sha256[:8]}) is another: name that encoder's "
                "folder with --text-encoder"
            )
        for text, length in zip(texts, self.lengths(texts), strict=True):
            if length > kind.tokens:
                say(f"{text!r} has {length} tokens, of which the model takes {kind.tokens}")
        embeddings = self(texts, kind.tokens).float()
        silent = [i for i, text in enumerate(texts) if not text]
        embeddings[silent] = 0
        return embeddings


def load(folder: Path) -> TextEncoder:
    """The encoder in a folder that holds a network and its tokenizer, as save_pretrained writes
    them; in a pipeline's folder the tokenizer lies in `tokenizer` beside it.

    UserError where either is missing or not whole.
    """
    library = pretrained.transformers(PURPOSE)
    try:
        family = json.loads((folder / "config.json").read_text()).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        family = ""
    encoders = library.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    # of a network with a decoder or with eyes, the part that reads
    architecture = "AutoModelForTextEncoding" if family in encoders else "AutoModel"
    architecture = "CLIPTextModel" if family == "clip" else architecture
    network = pretrained.network(folder, architecture, PURPOSE, unused=POOLER)
    tokenizer = tokenizer_of(folder, library)
    vocabulary = sorted(tokenizer.get_vocab().items())
    if tokenizer.pad_token is None:  # masked out in any case
        tokenizer.pad_token = tokenizer.eos_token or vocabulary[0][0]
    tokenizer.padding_side = "right"
    width = getattr(network.config, "hidden_size", None) or getattr(network.config, "dim", None)
    if not isinstance(width, int):
        raise UserError(f"{folder}: expected a text encoder whose config has a hidden_size")
    weights = {k: v for k, v in network.state_dict().items() if POOLER not in k}
    whole = (folder.parent / "model_index.json").is_file()
    identity = json.dumps([weights_sha256(weights), vocabulary, *["whole"] * whole])
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    most = min(MOST_TOKENS, getattr(network.config, "max_position_embeddings", MOST_TOKENS))
    name = "/".join(folder.resolve().parts[-2:])
    network = network.to(this_device())
    return TextEncoder(name, sha256, width, most, tokenizer, network, whole)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES)


def tokenizer_of(folder: Path, library: Any) -> Any:
    """The tokenizer in a folder, or in `tokenizer` beside it. library: transformers."""
    places = list(filter(has_tokenizer, (folder, folder.parent / "tokenizer")))
    expected = "expected one as save_pretrained writes it, beside the network's config.json"
    if not places:  # of which transformers would make an empty one
        raise UserError(f"{folder} holds no tokenizer: {expected}")
    try:
        return library.AutoTokenizer.from_pretrained(places[0], **pretrained.SAFE)
    except Exception as error:
        raise UserError(
            f"the tokenizer in {places[0]} does not load: {expected} ({first_line(error):.200})"
        ) from error
