"""DenseNets with active weighted mapping

timm's own DenseNets with an AWM merge in place of every plain concatenation of two or more maps: before each dense
layer but the first of its block, and at each block's end. The merges weigh the raw maps: the block's input is one,
every layer's output is one (the paper's Fig. 8).

Papers:
* `Residual Convolutional Neural Network Revisited with Active Weighted Mapping` - Jung et al., 2018
* `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993
"""
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
from timm.models import DenseNet
from timm.models.densenet import DenseBlock, DenseLayer
from torch import Tensor, nn

from ..layers import ConcatMerge
from .builder import AWM_BLOCKS, AWM_CLASSES, CIFAR10_CFG, AwmModel, register_awm_model


class AwmDenseLayer(DenseLayer):
    """timm's DenseLayer with a merge."""

    def bottleneck_fn(self, xs: List[Tensor]) -> Tensor:
        if not torch.jit.is_scripting() and isinstance(self.merge, ConcatMerge):
            x = self.merge.fused(xs, self.norm1)
            if x is not None:
                return self.conv1(x)
        return self.conv1(self.norm1(self.merge(xs)))


class AwmDenseBlock(DenseBlock):
    """timm's DenseBlock with merges: in every layer but the first, and one as its last child."""

    @staticmethod
    def make_merges(block: DenseBlock, hidden_features: int = 24) -> List[Tuple[nn.Module, nn.Module]]:
        """Makes the merges of a block, and says where each goes. The layers change class."""
        layers = list(block.values())
        weight = layers[0].conv1.weight
        channels = [layers[0].conv1.in_channels, *(layer.conv2.out_channels for layer in layers)]
        merges = [
            ConcatMerge(channels[:n], hidden_features, device=weight.device, dtype=weight.dtype)
            for n in range(2, len(channels) + 1)]
        for layer in layers[1:]:
            layer.__class__ = AwmDenseLayer
        return list(zip([*layers[1:], block], merges))

    def forward(self, x: Tensor) -> Tensor:
        """The merged maps, (batch, channels + layers * growth_rate, height, width)."""
        maps: List[Tensor] = []
        for child in self.values():  # the layers, then the merge
            maps.append(x)
            x = child(maps)
        return x


class AwmDenseNet(AwmModel, DenseNet):
    """timm's DenseNet with AWM merges."""

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        matcher = super().group_matcher(coarse)
        if isinstance(matcher['blocks'], list):
            # the merge at a block's end belongs to the block's last layer, as timm's transition does
            (_, _), (_, same_as_previous) = matcher['blocks']
            matcher['blocks'].append((r'^features\.denseblock(\d+)\.merge', same_as_previous))
        return matcher


class CifarDenseNet(DenseNet):
    """timm's DenseNet for 32x32 images: a 3x3 stem without norm and pooling, dense blocks at strides 1, 2, 4.

    Args:
        **kwargs: As for `timm.models.DenseNet`, but those of the stem.
    """

    def __init__(
            self, *args: Any, in_chans: int = 3, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        # timm's stem is made for large images: build with it, four times too coarse, then correct
        super().__init__(*args, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        conv0 = self.features.conv0
        self.features.conv0 = nn.Conv2d(
            in_chans, conv0.out_channels, 3, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        self.features.norm0 = nn.Identity()
        self.features.pool0 = nn.Identity()
        self.feature_info[0]['reduction'] = 1
        for info in self.feature_info[1:]:
            info['reduction'] //= 4


class AwmCifarDenseNet(AwmDenseNet, CifarDenseNet):
    """CifarDenseNet with AWM merges."""


AWM_BLOCKS[DenseBlock] = AwmDenseBlock
AWM_CLASSES.update({DenseNet: AwmDenseNet, CifarDenseNet: AwmCifarDenseNet})

default_cfgs: Dict[str, Any] = {}

for _name in ('awm_densenet121', 'awm_densenet161', 'awm_densenet169', 'awm_densenet201'):
    register_awm_model(globals(), _name, feature_cfg=dict(flatten_sequential=True))

for _name, _layers in {  # in each of three blocks
    'awm_densenet22_cifar': 3, 'awm_densenet28_cifar': 4, 'awm_densenet34_cifar': 5, 'awm_densenet40_cifar': 6,
}.items():
    register_awm_model(
        globals(),
        _name,
        partial(CifarDenseNet, growth_rate=12, block_config=(_layers,) * 3),
        dict(CIFAR10_CFG, first_conv='features.conv0', classifier='classifier'),
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)),
    )
