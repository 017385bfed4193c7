"""Networks by name. They know neither schedules nor losses."""

from diffusion.networks.unet import UNet, UNetConfig, check_net

__all__ = ["UNet", "UNetConfig", "check_net"]
