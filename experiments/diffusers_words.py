"""A teacher of words that is not ours: `python -m experiments.diffusers_words`.

A small pipeline of Stable Diffusion's layout (Rombach et al. 2022), trained on emoji and their
names: first its autoencoder, then a U-Net of its latents together with a CLIP text encoder.
Networks, tokenizer, scheduler and the average of weights are diffusers' and transformers' own. No
part of fewstep but the images has a hand in it: `--teacher diffusers:PATH` is tried on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from diffusion import emoji
from diffusion.console import UserError, at_least, check_limits, run, say
from diffusion.image_file import Form
from diffusion.machine import CACHE
from diffusion.networks.diffusers import library
from diffusion.pretrained import transformers
from experiments.diffusers_digits import fit

SIZE, FACTOR, CHANNELS = 32, 4, 4  # of images; pixels of a side for each latent's; of latents
VOCABULARY, TOKENS, TEXT_WIDTH = 2000, 16, 128  # longer captions are cut
WIDTH = 64  # channels at the finer of the U-Net's two levels; a quarter in the autoencoder
RATE, DECAY = 1e-3, 0.01  # AdamW's learning rate and weight decay
SILENT = 0.1  # share of the images whose caption is left out, which guidance needs


@dataclass(frozen=True)
class Options:
    """Train a small text-to-image pipeline on emoji by diffusers and transformers alone."""

    autoencoder_minutes: float = 3.0
    """Minutes of processor time of the autoencoder, however busy the machine is."""
    unet_minutes: float = 10.0
    """Minutes of processor time of the U-Net and its text encoder."""
    batch_size: int = 64
    """Images of a training step; of the autoencoder's, a quarter as many."""
    data_dir: Path | None = None
    """The folder that holds the emoji's packages; if left out, the cache, or npm's registry."""
    seed: int = 0
    """Seed of weights and noise."""
    out: Path = Path("runs/diffusers-words/pipeline")
    """The pipeline's folder."""


def train(options: Options) -> Path:
    """The pipeline's folder, as its save_pretrained writes it."""
    if options.out.exists():
        raise UserError(f"{options.out} is there already: delete it, or give another --out")
    source = emoji.load(options.data_dir, CACHE / "data", True, Form(SIZE))
    images = source.train.take(torch.arange(len(source.train))).images.float() / 127.5 - 1
    torch.manual_seed(options.seed)
    parts = untrained(source.captions[0])
    vae, unet, reader = parts["vae"], parts["unet"], parts["text_encoder"]

    def reconstruction() -> Tensor:
        clean = images[torch.randint(len(images), (options.batch_size // 4,))]
        posterior = vae.encode(clean).latent_dist
        again = vae.decode(posterior.sample()).sample
        return F.l1_loss(again, clean) + 1e-5 * posterior.kl().mean()

    fit("autoencoder", vae, reconstruction, options.autoencoder_minutes, 2 * RATE, DECAY)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents *= vae.config.scaling_factor
    padded: dict = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    texts, silence = (parts["tokenizer"](t, **padded).input_ids for t in (source.captions[0], [""]))

    def denoising() -> Tensor:
        numbers = torch.randint(len(latents), (options.batch_size,))
        silent = torch.rand(len(numbers), 1) < SILENT
        read = reader(torch.where(silent, silence, texts[numbers])).last_hidden_state
        noise = torch.randn(len(numbers), *latents.shape[1:])
        k = torch.randint(parts["scheduler"].config.num_train_timesteps, numbers.shape)
        noisy = parts["scheduler"].add_noise(latents[numbers], noise, k)
        return F.mse_loss(unet(noisy, k, encoder_hidden_states=read).sample, noise)

    fit("U-Net", nn.ModuleList([unet, reader]), denoising, options.unet_minutes, RATE, DECAY)
    unchecked: dict = {"safety_checker": None, "feature_extractor": None}
    made = library().StableDiffusionPipeline(**parts, **unchecked, requires_safety_checker=False)
    made.save_pretrained(options.out)
    say(str(options.out))
    return options.out


def untrained(captions: Sequence[str]) -> dict[str, Any]:
    """The pipeline's parts by its own names, of random weights; a tokenizer of these captions."""
    diffusers, language = library(), transformers("captions")
    empty = language.CLIPTokenizer(model_max_length=TOKENS)
    tokenizer = empty.train_new_from_iterator(captions, VOCABULARY, show_progress=False)
    blocks = {"layers_per_block": 1, "norm_num_groups": 8}
    vae = diffusers.AutoencoderKL(
        **blocks,
        sample_size=SIZE,
        block_out_channels=(WIDTH // 4, WIDTH // 2, WIDTH),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=CHANNELS,
        mid_block_add_attention=False,
    )
    unet = diffusers.UNet2DConditionModel(
        **blocks,
        sample_size=SIZE // FACTOR,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(WIDTH, 2 * WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # their number, in these networks
    )
    text_encoder = language.CLIPTextModel(
        language.CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
        )
    )
    scheduler = diffusers.DDIMScheduler(  # Stable Diffusion's levels, from the noisiest on
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    made = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    return {**made, "tokenizer": tokenizer, "scheduler": scheduler}


def main() -> None:
    options = tyro.cli(Options, prog="python -m experiments.diffusers_words")
    at_least(4, options, "batch_size")
    positive = ("above 0", lambda minutes: minutes > 0)
    check_limits(options, dict.fromkeys(("autoencoder_minutes", "unet_minutes"), positive))
    train(options)


if __name__ == "__main__":
    run(main)
