"""Networks by name. They know neither schedules nor losses."""

from diffusion.networks.unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
