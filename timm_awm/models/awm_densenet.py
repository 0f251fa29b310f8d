"""DenseNets with active weighted mapping

timm's own DenseNets with an AWM merge in place of every plain concatenation of two or more maps: before each dense
layer but the first of its block, and at each block's end. The merges weigh the raw maps: the block's input is one,
every layer's output is one (the paper's Fig. 8).

Papers:
* `Residual Convolutional Neural Network Revisited with Active Weighted Mapping` - Jung et al., 2018
* `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993
"""
from functools import partial
from typing import Any, Dict, List, Optional

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import DenseNet, checkpoint, generate_default_cfgs, register_model
from timm.models.densenet import DenseBlock, DenseLayer, _filter_torchvision_pretrained  # private: there is no other
from torch import Tensor, nn

from ..layers import ConcatMerge, can_fuse, descriptor, fused_concat, is_intercepted, map_moments
from ._awm import CIFAR10_CFG, AwmModel, create_awm_model, refuse_stem_arguments
from ._weights import identity_cfgs

__all__ = ['AwmDenseNet', 'CifarDenseNet', 'AwmCifarDenseNet', 'insert_concat_merges']


class AwmDenseLayer(DenseLayer):
    """timm's DenseLayer with a merge, none if it has a single input; made from one by `insert_concat_merges`."""

    def bottleneck(self, maps: List[Tensor], descriptors: List[Tensor], variances: Optional[List[Tensor]]) -> Tensor:
        if not torch.jit.is_scripting():
            x = self.fused_norm1(maps, descriptors, variances)
            if x is not None:
                return self.conv1(x)
        x = maps[0] if self.merge is None else self.merge(maps, descriptors)
        return self.conv1(self.norm1(x))

    @torch.jit.unused
    def fused_norm1(
            self,
            maps: List[Tensor],
            descriptors: List[Tensor],
            variances: Optional[List[Tensor]],
    ) -> Optional[Tensor]:
        norm = self.norm1
        if (
                not can_fuse(maps[0])
                or self.merge is None
                or type(norm) is not BatchNormAct2d
                or type(norm.act) is not nn.ReLU
                or type(norm.drop) is not nn.Identity
                or is_intercepted(self.merge, norm, norm.act)
        ):
            return None
        return fused_concat(self.merge.mix, maps, descriptors, variances, norm, relu=True)

    def checkpointed_bottleneck(
            self,
            maps: List[Tensor],
            descriptors: List[Tensor],
            variances: Optional[List[Tensor]],
    ) -> Tensor:
        n = len(maps)  # now: the block appends to its lists before this is computed again

        def closure(*tensors: Tensor) -> Tensor:
            return self.bottleneck(list(tensors[:n]), list(tensors[n:2 * n]), list(tensors[2 * n:]))

        return checkpoint(closure, *maps, *descriptors, *(variances or []))

    def forward(
            self,
            maps: List[Tensor],
            descriptors: List[Tensor],
            variances: Optional[List[Tensor]] = None,
    ) -> Tensor:
        """
        Args:
            maps: The block's input and the outputs of its earlier layers, (batch, channels[i], height, width).
            descriptors: The maps' descriptors, (batch, channels[i]).
            variances: Their variances over pixels, of the same shapes, if they are known.

        Returns:
            The layer's own map, (batch, growth_rate, height, width).
        """
        # as timm does it: re-entrant checkpointing gives no gradients at all if no input requires one
        if self.grad_checkpointing and not torch.jit.is_scripting() and self.any_requires_grad(maps):
            x = self.checkpointed_bottleneck(maps, descriptors, variances)
        else:
            x = self.bottleneck(maps, descriptors, variances)
        x = self.conv2(self.norm2(x))
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x


class AwmDenseBlock(DenseBlock):
    """timm's DenseBlock with merges, one as its last child; made from one by `insert_concat_merges`."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (batch, channels, height, width).

        Returns:
            The merged maps, (batch, channels + layers * growth_rate, height, width).
        """
        maps: List[Tensor] = []
        descriptors: List[Tensor] = []
        if torch.jit.is_scripting():
            for layer in self.values():  # the layers, then the merge
                maps.append(x)
                descriptors.append(descriptor(x))
                x = layer(maps, descriptors)
            return x
        else:
            *layers, merge = self.values()
            variances: List[Tensor] = []
            for layer in layers:
                x, mean, var = map_moments(x, variance=self.training)
                maps.append(x)
                descriptors.append(mean)
                if var is not None:
                    variances.append(var)
                x = layer(maps, descriptors, variances)
            x, mean, _ = map_moments(x, variance=self.training)
            return merge([*maps, x], [*descriptors, mean])


def insert_concat_merges(model: nn.Module, hidden_features: int = 24) -> None:
    """Give every dense block of timm's its merges, in place, at the identity start.

    The blocks and layers change class and keep all else: parameters and their names, hooks, mode.

    Raises:
        ValueError: The model has no such block.
    """
    blocks = [m for m in model.modules() if type(m) is DenseBlock and len(m)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no dense block of timm's own class to give merges to.")
    merges: List[List[Optional[nn.Module]]] = []  # all of them before anything is changed
    for block in blocks:
        layers = list(block.values())
        weight = layers[0].conv1.weight
        new_merge = partial(ConcatMerge, hidden_features=hidden_features, device=weight.device, dtype=weight.dtype)
        channels = [layers[0].conv1.in_channels, *(layer.conv2.out_channels for layer in layers)]
        merges.append([None, *(new_merge(channels[:n]).train(block.training) for n in range(2, len(channels) + 1))])
    for block, (*of_layers, last) in zip(blocks, merges):
        for layer, merge in zip(block.values(), of_layers):
            layer.__class__ = AwmDenseLayer
            layer.add_module('merge', merge)
        block.__class__ = AwmDenseBlock
        block.add_module('merge', last)


class AwmDenseNet(AwmModel, DenseNet):
    """timm's DenseNet with AWM merges.

    Args:
        awm_hidden: Width e of the merges' hidden layers.
        **kwargs: As for `timm.models.DenseNet`.
    """

    def __init__(self, *args, awm_hidden: int = 24, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        insert_concat_merges(self, awm_hidden)
        self.total_stride = self.feature_info[-1]['reduction']

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

    def __init__(self, *args, in_chans: int = 3, device=None, dtype=None, **kwargs) -> None:
        refuse_stem_arguments(kwargs, 'stem_type')
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
    """CifarDenseNet with AWM merges.

    Args:
        awm_hidden: Width e of the merges' hidden layers.
        **kwargs: As for `CifarDenseNet`.
    """


def _create_awm_densenet(variant: str, pretrained: bool = False, **kwargs) -> DenseNet:
    return create_awm_model(
        AwmDenseNet,
        DenseNet,
        variant,
        pretrained,
        pretrained_filter_fn=_filter_torchvision_pretrained,
        feature_cfg=dict(flatten_sequential=True),
        **kwargs,
    )


def _create_awm_densenet_cifar(
        variant: str,
        layers_per_block: int,
        pretrained: bool = False,
        **kwargs,
) -> CifarDenseNet:
    model_args = dict(growth_rate=12, block_config=(layers_per_block,) * 3)
    return create_awm_model(
        AwmCifarDenseNet,
        CifarDenseNet,
        variant,
        pretrained,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)),
        **dict(model_args, **kwargs),
    )


CIFAR_CFG = dict(CIFAR10_CFG, first_conv='features.conv0', classifier='classifier')

default_cfgs = generate_default_cfgs({
    **identity_cfgs('awm_densenet121'),
    **identity_cfgs('awm_densenet161'),
    **identity_cfgs('awm_densenet169'),
    **identity_cfgs('awm_densenet201'),
    'awm_densenet22_cifar.untrained': CIFAR_CFG,
    'awm_densenet28_cifar.untrained': CIFAR_CFG,
    'awm_densenet34_cifar.untrained': CIFAR_CFG,
    'awm_densenet40_cifar.untrained': CIFAR_CFG,
})


@register_model
def awm_densenet121(pretrained: bool = False, **kwargs) -> DenseNet:
    """DenseNet-121 with AWM merges.
    """
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16))
    return _create_awm_densenet('awm_densenet121', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_densenet161(pretrained: bool = False, **kwargs) -> DenseNet:
    """DenseNet-161 with AWM merges.
    """
    model_args = dict(growth_rate=48, block_config=(6, 12, 36, 24))
    return _create_awm_densenet('awm_densenet161', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_densenet169(pretrained: bool = False, **kwargs) -> DenseNet:
    """DenseNet-169 with AWM merges.
    """
    model_args = dict(growth_rate=32, block_config=(6, 12, 32, 32))
    return _create_awm_densenet('awm_densenet169', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_densenet201(pretrained: bool = False, **kwargs) -> DenseNet:
    """DenseNet-201 with AWM merges.
    """
    model_args = dict(growth_rate=32, block_config=(6, 12, 48, 32))
    return _create_awm_densenet('awm_densenet201', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_densenet22_cifar(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-22 for 32x32 images with AWM merges, 3 bottleneck layers in each block.
    """
    return _create_awm_densenet_cifar('awm_densenet22_cifar', 3, pretrained, **kwargs)


@register_model
def awm_densenet28_cifar(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-28 for 32x32 images with AWM merges, 4 bottleneck layers in each block.
    """
    return _create_awm_densenet_cifar('awm_densenet28_cifar', 4, pretrained, **kwargs)


@register_model
def awm_densenet34_cifar(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-34 for 32x32 images with AWM merges, 5 bottleneck layers in each block.
    """
    return _create_awm_densenet_cifar('awm_densenet34_cifar', 5, pretrained, **kwargs)


@register_model
def awm_densenet40_cifar(pretrained: bool = False, **kwargs) -> CifarDenseNet:
    """DenseNet-40 for 32x32 images with AWM merges, 6 bottleneck layers in each block.
    """
    return _create_awm_densenet_cifar('awm_densenet40_cifar', 6, pretrained, **kwargs)
