"""The merge: what stands where a network has a plain sum or a plain concatenation.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.1
for sums, section 4.3 and Fig. 8 for concatenations.

λ and the weighing are computed in float32 (float64 for float64 maps) whatever the autocast, and the merged map is
rounded once, to the dtype of its paths.
"""
from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor, nn

from .fused import fuse, trust
from .mixing import MixingWeights, descriptors, is_mkldnn, weigh_concat, weigh_sum


class SumMerge(nn.Module):
    """Replaces F(x) + x by 2 · (λ1 · F(x) + λ2 · x), λ inferred from both paths (eq. 2, times 2).

    Args:
        channels: Channels C of either path.
        hidden_features: Width e of the hidden layer, 16 in the paper's ResNets.
    """

    def __init__(self, channels: int, hidden_features: int = 16, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.mix = MixingWeights(2 * channels, 2, hidden_features, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f'channels={self.mix.weight1.shape[1] // 2}'

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Merges F(x) and x, both (batch, channels, height, width), in the dtype of branch.

        Raises:
            ValueError: The paths have more or fewer channels.
        """
        if not torch.jit.is_scripting():
            fused = self.fused(branch, shortcut)
            if fused is not None:
                return fused
            if is_mkldnn(branch):
                return self.forward(branch.to_dense(), shortcut.to_dense()).to_mkldnn()
        return weigh_sum(self.mix(descriptors([branch, shortcut])), branch, shortcut)

    def fused(
            self, branch: Tensor, shortcut: Tensor, norm: Any = None, act: Any = None, conv: Any = None,
    ) -> Optional[Tensor]:
        """act(self(norm(branch), shortcut)), fused; or None, with nothing done, where it cannot be fused. norm is
        BatchNorm2d, act ReLU, or None. If conv, a convolution, made branch, branch is overwritten without gradients."""
        return fuse(self, (branch, shortcut), norm, act, ((self, SumMerge), (act, nn.ReLU)), is_sum=True, conv=conv)


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
        """Merges maps of (batch, channels[i], height, width) into (batch, sum(channels), height, width).

        Raises:
            ValueError: There are more or fewer maps, or channels.
        """
        if len(maps) != self.mix.num_paths:
            raise ValueError(f'Got {len(maps)} maps for a merge of {self.mix.num_paths} paths.')
        if not torch.jit.is_scripting():
            fused = self.fused(maps)
            if fused is not None:
                return fused
            if is_mkldnn(maps[0]):
                return self.forward([x.to_dense() for x in maps]).to_mkldnn()
        return weigh_concat(self.mix(descriptors(maps)), maps)

    def fused(self, maps: List[Tensor], norm: Any = None) -> Optional[Tensor]:
        """norm(self(maps)), fused; or None, with nothing done, where it cannot be fused. norm is timm's BatchNormAct2d
        with a ReLU, or None."""
        act, drop = getattr(norm, 'act', None), getattr(norm, 'drop', None)
        return fuse(self, maps, norm, act, ((self, ConcatMerge), (act, nn.ReLU), (drop, nn.Identity)), is_sum=False)


trust(SumMerge, 'forward', '__call__')
trust(ConcatMerge, 'forward', '__call__')
