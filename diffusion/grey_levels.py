"""The discretised Gaussian: the chance of each of the 256 levels of a pixel."""

import math

import torch
from torch import Tensor


def log_levels(images: Tensor, centre: Tensor, deviation: Tensor) -> Tensor:
    """log P of each grey level: a Gaussian's mass from half a level below it to half above.

    The outermost levels reach to infinity (Ho et al. 2020, eq. 13). Exact far out in the tails.
    images: uint8, or the same whole numbers as floats; centre: float64, deviation: > 0, both in
    grey levels.
    """
    low = torch.where(images == 0, -math.inf, (images - 0.5 - centre) / deviation)
    high = torch.where(images == 255, math.inf, (images + 0.5 - centre) / deviation)
    # the mass is mirrored to the lower tail, where the difference of cdfs does not cancel
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + (-torch.expm1(log_low - log_high)).log()
