"""The operands of a merge with the BatchNorm and the ReLU beside it, and its plain formula."""
from typing import Any, List, NamedTuple, Optional, Tuple

import torch.nn.functional as F
from torch import Tensor

from .mixing import descriptors, mixing_logits, scaled_mixing_weights, weigh_concat, weigh_sum


class Operands(NamedTuple):
    """A sum normalises its first map, the branch, and merges it with the second. A concatenation merges all maps and
    normalises the result. Weights are float32, float64 for float64 maps."""
    is_sum: bool
    eps: float
    relu: bool  # whether one comes last
    weight1: Tensor  # W1, (hidden, features)
    weight2: Tensor  # W2, (paths, hidden)
    gamma: Tensor  # BatchNorm's weight, (channels,), as its bias beta and its running statistics are
    beta: Tensor
    running_mean: Optional[Tensor]  # None, as running_var, if BatchNorm uses the batch's statistics
    running_var: Optional[Tensor]
    maps: Tuple[Tensor, ...]  # (batch, channels[i], height, width)

    @classmethod
    def of(cls, *values: Any) -> 'Operands':
        """Operands from what `flat` returns."""
        others = len(cls._fields) - 1
        return cls._make((*values[:others], values[others:]))

    def flat(self) -> Tuple[Any, ...]:
        """The fields as one tuple, each map by itself, as autograd needs them."""
        return *self[:-1], *self.maps

    def channels(self) -> List[int]:
        return [x.shape[1] for x in self.maps]


def formula(o: Operands) -> Tensor:
    """The merged map by the plain formula, which can be differentiated twice."""
    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, o.running_mean, o.running_var, o.gamma, o.beta, o.running_mean is None, eps=o.eps)

    maps = [norm(o.maps[0]), o.maps[1]] if o.is_sum else list(o.maps)
    scales = scaled_mixing_weights(mixing_logits(descriptors(maps), o.weight1, o.weight2))
    y = weigh_sum(scales, *maps) if o.is_sum else norm(weigh_concat(scales, maps))
    return y.relu() if o.relu else y
