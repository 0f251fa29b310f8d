"""The merge: what stands where a network has a plain sum or a plain concatenation.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.1
for sums, section 4.3 and Fig. 8 for concatenations.
"""
import math
import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.fx
from torch import Tensor, nn

from .functional import descriptor, mixing_logits, scaled_mixing_weights, weighted_concat, weighted_sum
from .fused import fused_concat, fused_merge

__all__ = ['MixingWeights', 'SumMerge', 'ConcatMerge', 'count_parameters', 'merge_parameters']

# torch.fx cannot follow the dtype and the device of a proxy
torch.fx.wrap('descriptor')
torch.fx.wrap('mixing_logits')
torch.fx.wrap('weighted_concat')

# An optimizer is handed parameters, never the model: this is how it can tell which of them belong to a merge.
_live: 'weakref.WeakSet[MixingWeights]' = weakref.WeakSet()


class MixingWeights(nn.Module):
    """Infers the mixing weights λ of n paths from their descriptors (eq. 4 and the normalisation after it).

    Two FC layers without bias: W1, (hidden_features, num_features), and W2, (num_paths, hidden_features).
    W1 starts as in `torch.nn.Linear`, W2 at zero, so that every λ starts at exactly 1/n (`reference.md`: the authors'
    code does the same, which is the paper's "we set the weight values to 0.5").

    Args:
        num_features: Channels of all paths together (2C for a sum).
        num_paths: Number of paths n.
        hidden_features: Width e of the hidden layer.
    """

    def __init__(self, num_features: int, num_paths: int, hidden_features: int, device=None, dtype=None) -> None:
        super().__init__()
        if num_paths < 2:
            raise ValueError(f'A merge weighs at least two paths, got {num_paths}.')
        if not isinstance(hidden_features, int) or hidden_features < 1:
            raise ValueError(f'The hidden layer of a merge needs a positive whole width, got {hidden_features!r}.')
        self.num_paths = num_paths
        # no nn.Linear: whatever swaps or hooks those would miss that both are applied in float32
        self.weight1 = nn.Parameter(torch.empty(hidden_features, num_features, device=device, dtype=dtype))
        self.weight2 = nn.Parameter(torch.empty(num_paths, hidden_features, device=device, dtype=dtype))
        self.reset_parameters()
        _live.add(self)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight1, a=math.sqrt(5))
        nn.init.zeros_(self.weight2)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _live.add(self)  # copied or unpickled

    def forward(self, z: Tensor) -> Tensor:
        """
        Args:
            z: Descriptors side by side, (batch, num_features), float32 or float64.

        Returns:
            n · λ, (batch, num_paths).
        """
        return scaled_mixing_weights(mixing_logits(z, self.weight1, self.weight2))


class SumMerge(nn.Module):
    """Replaces F(x) + x by 2 · (λ1 · F(x) + λ2 · x), λ inferred from both paths (eq. 2).

    Args:
        channels: Channels C of either path.
        hidden_features: Width e of the hidden layer, 16 in the paper's ResNets.
    """

    def __init__(self, channels: int, hidden_features: int = 16, device=None, dtype=None) -> None:
        super().__init__()
        self.mix = MixingWeights(2 * channels, 2, hidden_features, device=device, dtype=dtype)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """
        Args:
            branch: F(x), (batch, channels, height, width).
            shortcut: x, of the same shape.

        Returns:
            The merged map, of the same shape, in the dtype of branch.
        """
        if not torch.jit.is_scripting():
            fused = fused_merge(self.mix, branch, shortcut)
            if fused is not None:
                return fused[0]
        z = torch.cat([descriptor(branch), descriptor(shortcut)], dim=1)
        return weighted_sum(branch, shortcut, self.mix(z))


class ConcatMerge(nn.Module):
    """Replaces torch.cat(maps, 1) by the concatenation of n · λi · map_i, λ inferred from all maps (Fig. 8).

    Args:
        channels: Channels of each map, in order.
        hidden_features: Width e of the hidden layer, 24 in the authors' DenseNets (`reference.md`).
    """

    def __init__(self, channels: Sequence[int], hidden_features: int = 24, device=None, dtype=None) -> None:
        super().__init__()
        self.mix = MixingWeights(sum(channels), len(channels), hidden_features, device=device, dtype=dtype)

    def forward(self, maps: List[Tensor], descriptors: Optional[List[Tensor]] = None) -> Tensor:
        """
        Args:
            maps: As many maps as there are channels entries, (batch, channels[i], height, width).
            descriptors: The maps' `descriptor`s, where the caller has them already: a DenseNet meets each map in many
                merges and pools it once.

        Returns:
            (batch, sum(channels), height, width).
        """
        if descriptors is None:
            descriptors = [descriptor(x) for x in maps]
        if not torch.jit.is_scripting():
            fused = fused_concat(self.mix, maps, descriptors)
            if fused is not None:
                return fused
        return weighted_concat(maps, self.mix(torch.cat(descriptors, dim=1)))


def merge_parameters() -> List[nn.Parameter]:
    """The parameters of all merges that are alive in this process."""
    return [p for mix in list(_live) for p in mix.parameters()]


def count_parameters(model: nn.Module) -> Tuple[int, int, int]:
    """The number of parameters of a model, of those in its merges, and of its merges."""
    merges = [m for m in model.modules() if isinstance(m, MixingWeights)]
    in_merges = sum(p.numel() for m in merges for p in m.parameters())
    return sum(p.numel() for p in model.parameters()), in_merges, len(merges)


def renew_compiled_guards() -> None:
    """Makes compiled networks with merges look again at which parameters require gradients.

    torch.compile trusts a module whose dict of parameters has not changed, and in torch 2.6 does not see
    `requires_grad_` (pytorch/pytorch#139476): after a phase change it would go on with the graph of the other phase.
    """
    for mix in list(_live):
        for name in list(mix._parameters):
            mix._parameters[name] = mix._parameters.pop(name)
