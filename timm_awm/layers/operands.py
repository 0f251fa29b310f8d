"""The operands of a merge with the BatchNorm and the ReLU beside it, and its plain formula."""
from typing import NamedTuple, Optional, Tuple

import torch.nn.functional as F
from torch import Tensor

from .mixing import descriptors, mixing_logits, scaled_mixing_weights, weigh_concat, weigh_sum


class Operands(NamedTuple):
    """A sum normalises u, the branch, and merges it with v, the shortcut. A concatenation weighs the maps side by side
    in u, and normalises the result. Weights are float32, float64 for float64 maps."""
    widths: Tuple[int, ...]  # channels of each map in a concatenation; empty for a sum
    eps: float
    relu: bool  # whether one comes last
    weight1: Tensor  # W1, (hidden, features)
    weight2: Tensor  # W2, (paths, hidden)
    gamma: Tensor  # BatchNorm's weight, (channels,), as its bias beta and its running statistics are
    beta: Tensor
    running_mean: Optional[Tensor]  # None, as running_var, if BatchNorm uses the batch's statistics
    running_var: Optional[Tensor]
    u: Tensor  # (batch, channels, height, width)
    v: Optional[Tensor]  # as u; None for a concatenation


def formula(o: Operands) -> Tensor:
    """The merged map by the plain formula, which can be differentiated twice."""
    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, o.running_mean, o.running_var, o.gamma, o.beta, o.running_mean is None, eps=o.eps)

    maps = list(o.u.split(o.widths, dim=1)) if o.v is None else [norm(o.u), o.v]
    scales = scaled_mixing_weights(mixing_logits(descriptors(maps), o.weight1, o.weight2))
    y = norm(weigh_concat(scales, maps)) if o.v is None else weigh_sum(scales, *maps)
    return y.relu() if o.relu else y
