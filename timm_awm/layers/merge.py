"""The merge: what stands where a network has a plain sum or a plain concatenation.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.1
for sums, section 4.3 and Fig. 8 for concatenations.

λ and the weighing are computed in float32 (float64 for float64 maps) whatever the autocast, and the merged map is
rounded once, to the dtype of its paths.
"""
from typing import Any, List, Optional, Sequence

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .fused import can_fuse, fused_merge
from .mixing import MixingWeights, channel_mean
from .torch_private import is_exactly

__all__ = ['SumMerge', 'ConcatMerge', 'fused_sum', 'fused_concat']


class SumMerge(nn.Module):
    """Replaces F(x) + x by 2 · (λ1 · F(x) + λ2 · x), λ inferred from both paths (eq. 2, times 2).

    Args:
        channels: Channels C of either path.
        hidden_features: Width e of the hidden layer, 16 in the paper's ResNets.
    """

    def __init__(self, channels: int, hidden_features: int = 16, device: Any = None, dtype: Any = None) -> None:
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
            fused = fused_sum(self, branch, shortcut)
            if fused is not None:
                return fused
        scales = self.mix(torch.cat([channel_mean(branch), channel_mean(shortcut)], dim=1))
        # a · F + b · x and no lerp: the plain sum, bit for bit, at λ = ½. mul, as `*` of torch.fx's
        # optimize_for_inference cannot broadcast
        a, b = scales.view(-1, 2, 1, 1, 1).unbind(1)
        return (branch.mul(a) + shortcut.mul(b)).to(branch.dtype)


class ConcatMerge(nn.Module):
    """Replaces torch.cat(maps, 1) by the concatenation of n · λi · map_i, λ inferred from all maps (Fig. 8).

    Args:
        channels: Channels of each map, in order.
        hidden_features: Width e of the hidden layer, 24 in the authors' DenseNets (docs/method.md).
    """

    def __init__(
            self, channels: Sequence[int], hidden_features: int = 24, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.mix = MixingWeights(sum(channels), len(channels), hidden_features, device=device, dtype=dtype)

    def forward(self, maps: List[Tensor]) -> Tensor:
        """
        Args:
            maps: As many as there are channels entries, (batch, channels[i], height, width).

        Returns:
            (batch, sum(channels), height, width).

        Raises:
            ValueError: The number of maps is not that of the weights.
        """
        if len(maps) != self.mix.num_paths:
            raise ValueError(f'Got {len(maps)} maps for a merge of {self.mix.num_paths} paths.')
        if not torch.jit.is_scripting():
            fused = fused_concat(self, maps)
            if fused is not None:
                return fused
        scales = self.mix(torch.cat([channel_mean(x) for x in maps], dim=1))
        weights = scales[:, :, None, None, None]
        return torch.cat([x.mul(weights[:, i]).to(x.dtype) for i, x in enumerate(maps)], dim=1)


def fused_sum(
        merge: nn.Module,
        branch: Tensor,
        shortcut: Tensor,
        norm: Optional[nn.Module] = None,
        act: Optional[nn.Module] = None,
        conv: Optional[nn.Module] = None,
) -> Optional[Tensor]:
    """act(merge(norm(branch), shortcut)), fused.

    Args:
        merge: A `SumMerge`.
        branch: (batch, channels, height, width).
        shortcut: Of the same shape.
        norm: BatchNorm2d, none if None.
        act: ReLU, none if None.
        conv: The convolution that made branch. Nobody else has it then, and without gradients it is overwritten.

    Returns:
        The merged map; or None, with nothing done, where it cannot be fused.
    """
    skipped = ((merge, SumMerge), (getattr(merge, 'mix', None), MixingWeights), (norm, nn.BatchNorm2d), (act, nn.ReLU))
    if not can_fuse((branch, shortcut), skipped) or branch.shape != shortcut.shape:
        return None
    return fused_merge(
        (branch, shortcut), merge.mix, norm, act is not None, is_sum=True, overwrite=is_exactly(conv, nn.Conv2d))


def fused_concat(merge: nn.Module, maps: List[Tensor], norm: Optional[nn.Module] = None) -> Optional[Tensor]:
    """norm(merge(maps)), fused.

    Args:
        merge: A `ConcatMerge`.
        maps: As many as the merge has paths, (batch, channels[i], height, width).
        norm: timm's BatchNormAct2d with a ReLU, none if None.

    Returns:
        (batch, sum(channels), height, width); or None, with nothing done, where it cannot be fused.
    """
    skipped = [(merge, ConcatMerge), (getattr(merge, 'mix', None), MixingWeights), (norm, BatchNormAct2d)]
    if norm is not None:
        skipped += [(getattr(norm, 'act', None), nn.ReLU), (getattr(norm, 'drop', None), nn.Identity)]
    if not can_fuse(maps, skipped):
        return None
    return fused_merge(maps, merge.mix, norm, norm is not None, is_sum=False)
