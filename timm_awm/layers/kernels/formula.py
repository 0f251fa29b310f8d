"""The coefficients of a merge in plain torch: for GPUs, and to be differentiated twice."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..mixing import mixing_logits, scaled_mixing_weights

__all__ = ['coefficients', 'coefficients_backward']


def coefficients(
        mean: Tensor, var: Optional[Tensor], other: Optional[Tensor], weight1: Tensor, weight2: Tensor, gamma: Tensor,
        beta: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], eps: float,
        channels: Sequence[int],
) -> List[Tensor]:
    def normalise(mean: Tensor, var: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        if var is None:
            assert running_mean is not None and running_var is not None
            mu, sigma2 = running_mean, running_var
        else:
            mu = mean.mean(0)
            sigma2 = (var + (mean - mu).square()).mean(0)
        k = gamma * (sigma2 + eps).rsqrt()
        return k, beta - mu * k, torch.stack([mu, sigma2])

    def scales(z: Tensor) -> Tensor:
        return scaled_mixing_weights(mixing_logits(z, weight1, weight2))

    if other is None:
        weights = scales(mean).split(1, dim=1)
        w = torch.cat([weight.expand(-1, c) for weight, c in zip(weights, channels)], dim=1)
        k, s, stats = normalise(w * mean, None if var is None else w.square() * var)
        return [torch.stack([w * k, s.expand_as(w)]), stats]
    k, s, stats = normalise(mean, var)
    w, w_other = scales(torch.cat([mean * k + s, other], dim=1)).split(1, dim=1)
    return [torch.stack([w * k, w * s, w_other.expand_as(mean)]), stats]


def coefficients_backward(grads: Tensor, pixels: int, *args: Any) -> List[Tensor]:
    with torch.enable_grad():
        inputs: List[Any] = [x if x is None else x.detach().requires_grad_() for x in args[:7]]
        coefs, _ = coefficients(*inputs, *args[7:])
    results = iter(torch.autograd.grad(coefs, [x for x in inputs if x is not None], grads))
    of_inputs: List[Any] = [None if x is None else next(results) for x in inputs]
    of_mean, of_var, of_other, *of_parameters = of_inputs
    scale = torch.zeros_like(of_mean) if of_var is None else of_var * (2 / pixels)
    of_maps = [scale, of_mean / pixels - scale * args[0]] + ([] if of_other is None else [of_other / pixels])
    return [torch.stack(of_maps), *of_parameters]
