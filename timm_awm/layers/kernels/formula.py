"""The merge in plain torch: for what lies between two kernels on GPUs, and to be differentiated twice."""
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..mixing import mixing_logits, scaled_mixing_weights, wide_dtype

__all__ = ['coefficients', 'merge']


def coefficients(
        mean: Tensor, var: Tensor, other: Optional[Tensor], weight1: Tensor, weight2: Tensor, gamma: Tensor,
        beta: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], eps: float,
        channels: Sequence[int],
) -> Tuple[Tuple[Tensor, Optional[Tensor], Tensor], Tensor]:
    """a, b and c, (batch, channels of u), b None in a concatenation; the mean and the variance that BatchNorm uses.

    Args:
        mean, var: Of u, (batch, channels of u).
        other: The mean of v, None in a concatenation.
    """
    def normalise(mean: Tensor, var: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        mu = mean.mean(0) if running_mean is None else running_mean
        sigma2 = (var + (mean - mu).square()).mean(0) if running_var is None else running_var
        k = gamma * (sigma2 + eps).rsqrt()
        return k, beta - mu * k, torch.stack([mu, sigma2])

    def scales(z: Tensor) -> Tensor:
        return scaled_mixing_weights(mixing_logits(z, weight1, weight2))

    if other is None:
        weights = scales(mean).split(1, dim=1)
        w = torch.cat([weight.expand(-1, c) for weight, c in zip(weights, channels)], dim=1)
        k, t, stats = normalise(w * mean, w.square() * var)
        return (w * k, None, t.expand_as(w)), stats
    k, t, stats = normalise(mean, var)
    w, w_other = scales(torch.cat([mean * k + t, other], dim=1)).split(1, dim=1)
    return (w * k, w_other.expand_as(mean), w * t), stats


def merge(u: Tensor, v: Optional[Tensor], *args: Any) -> Tensor:
    """The result of `kernels.merge` alone."""
    *inputs, relu = args
    dtype = wide_dtype(u)
    var, mean = torch.var_mean(u.to(dtype), (2, 3), correction=0)
    other = None if v is None else v.mean((2, 3), dtype=dtype)
    a, b, c = coefficients(mean, var, other, *inputs)[0]
    y = a[:, :, None, None] * u + c[:, :, None, None]
    if v is not None and b is not None:
        y = y + b[:, :, None, None] * v
    y = y.to(u.dtype)
    return y.relu() if relu else y
