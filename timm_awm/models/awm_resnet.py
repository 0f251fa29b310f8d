"""ResNets with active weighted mapping

timm's own ResNets with an AWM merge in place of every block's plain sum, for ImageNet and, in their CIFAR form
(6n + 2 layers of 16, 32 and 64 channels), for 32x32 images.

Papers:
* `Residual Convolutional Neural Network Revisited with Active Weighted Mapping` - Jung et al., 2018
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
* `Bag of Tricks for Image Classification with Convolutional Neural Networks` - https://arxiv.org/abs/1812.01187
* `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431
* `Wide Residual Networks` - https://arxiv.org/abs/1605.07146
"""
from typing import List, Optional, Tuple, Union

import torch
from timm.models import BasicBlock, Bottleneck, ResNet, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import SumMerge, can_fuse, fused_merge, is_intercepted
from ._awm import CIFAR10_CFG, AwmModel, create_awm_model, refuse_stem_arguments
from ._weights import identity_cfgs

__all__ = ['AwmResNet', 'CifarResNet', 'AwmCifarResNet', 'insert_sum_merges']


class AwmBlock(nn.Module):
    """A residual block of timm's with a merge: what AwmBasicBlock and AwmBottleneck share."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            y = self.plain(x)
        else:
            y = self.forward_pooled(x)[0]
        return y

    def plain(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.tail(self.last_conv(self.inner(x)), shortcut)

    @torch.jit.unused
    def forward_pooled(self, x: Tensor, pooled: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
        """The block, fused where it can be.

        Args:
            x: (batch, in_channels, height, width).
            pooled: The mean of x over its pixels, (batch, in_channels), if the block before has left it.

        Returns:
            The block's output, and the mean of that where it has come by the way.
        """
        if not can_fuse(x):
            return self.plain(x), None
        conv, norm, act = self.last_modules()
        inner = self.inner(x)
        u = conv(inner)
        v, shortcut_norm = x, None
        if self.downsample is not None:
            v, shortcut_norm = _downsample(self.downsample, x)
            pooled = None
        if self.se is None and (self.drop_path is None or not self.training) and not is_intercepted(self.merge):
            origin = (conv, inner) if isinstance(conv, nn.Conv2d) and not is_intercepted(conv) else None
            fused = fused_merge(self.merge.mix, u, v, norm, shortcut_norm, act, pooled, origin)
            if fused is not None:
                return fused
        return self.tail(u, v if shortcut_norm is None else shortcut_norm(v)), None


class AwmBasicBlock(AwmBlock, BasicBlock):
    """timm's BasicBlock with a merge; made from one by `insert_sum_merges`."""

    def inner(self, x: Tensor) -> Tensor:
        return self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))

    def last_conv(self, x: Tensor) -> Tensor:
        return self.conv2(x)

    def tail(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act2(self.merge(x, shortcut))

    @torch.jit.unused
    def last_modules(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        return self.conv2, self.bn2, self.act2


class AwmBottleneck(AwmBlock, Bottleneck):
    """timm's Bottleneck with a merge; made from one by `insert_sum_merges`."""

    def inner(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))

    def last_conv(self, x: Tensor) -> Tensor:
        return self.conv3(x)

    def tail(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act3(self.merge(x, shortcut))

    @torch.jit.unused
    def last_modules(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        return self.conv3, self.bn3, self.act3


class AwmStage(nn.Sequential):
    """A stage of blocks, which hand the means of their outputs on; made by `insert_sum_merges` of an nn.Sequential."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for block in self:
                x = block(x)
        else:
            pooled = None
            for block in self:
                if (
                        can_fuse(x)
                        and isinstance(block, AwmBlock)
                        and type(block).forward is AwmBlock.forward
                        and not is_intercepted(block)
                ):
                    x, pooled = block.forward_pooled(x, pooled)
                else:
                    x, pooled = block(x), None
        return x


def _downsample(downsample: nn.Module, x: Tensor) -> Tuple[Tensor, Optional[nn.Module]]:
    """The shortcut's map before its BatchNorm, and that, if there is one at its end."""
    if type(downsample) is not nn.Sequential or is_intercepted(downsample):
        return downsample(x), None
    *layers, norm = downsample
    for layer in layers:
        x = layer(x)
    return x, norm


def insert_sum_merges(model: nn.Module, hidden_features: int = 16) -> None:
    """Give every BasicBlock and Bottleneck of timm's a merge, in place, at the identity start.

    The blocks change class and keep all else: parameters and their names, hooks, mode. So the network is initialised
    before its merges are, and draws the same random numbers as the plain one.

    Raises:
        ValueError: The model has no such block.
    """
    blocks = [m for m in model.modules() if type(m) in (BasicBlock, Bottleneck)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no BasicBlock or Bottleneck of timm's own to give merges to.")
    merges = []  # all of them before anything is changed
    for block in blocks:
        last_conv = block.conv2 if type(block) is BasicBlock else block.conv3
        weight = last_conv.weight
        merges.append(SumMerge(last_conv.out_channels, hidden_features, device=weight.device, dtype=weight.dtype))
    for block, merge in zip(blocks, merges):
        block.__class__ = AwmBasicBlock if type(block) is BasicBlock else AwmBottleneck
        block.merge = merge.train(block.training)
    for stage in model.modules():
        if type(stage) is nn.Sequential and any(isinstance(block, AwmBlock) for block in stage):
            stage.__class__ = AwmStage


class AwmResNet(AwmModel, ResNet):
    """timm's ResNet with AWM merges.

    Args:
        awm_hidden: Width e of the merges' hidden layer.
        **kwargs: As for `timm.models.ResNet`.
    """

    def __init__(self, *args, awm_hidden: int = 16, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        insert_sum_merges(self, awm_hidden)
        self.total_stride = self.feature_info[-1]['reduction']


class CifarResNet(ResNet):
    """The ResNet of 6n + 2 layers for 32x32 images, of timm's blocks: a 3x3 stem and three stages of strides 1, 2, 4.

    Args:
        output_stride: 4, or 2 for a dilated last stage.
        **kwargs: As for `timm.models.ResNet`, but those of the stem.
    """

    def __init__(self, *args, in_chans: int = 3, output_stride: int = 4, device=None, dtype=None, **kwargs) -> None:
        refuse_stem_arguments(kwargs, 'stem_type', 'stem_width', 'replace_stem_pool', 'channels')
        if output_stride not in (2, 4):
            raise ValueError(f'A CIFAR ResNet has an output stride of 2 or 4, not {output_stride}.')
        # timm's stem and strides are made for large images: build with those, four times too coarse, then correct
        super().__init__(
            *args,
            in_chans=in_chans,
            output_stride=4 * output_stride,
            channels=(16, 32, 64),
            stem_type='deep',
            stem_width=8,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()  # forward_features names it
        self.feature_info[0]['reduction'] = 1
        for info in self.feature_info[1:]:
            info['reduction'] //= 4

    def init_weights(self, zero_init_last: bool = False) -> None:
        """PyTorch's own initialisation, as in the authors' code (`reference.md`)."""
        if zero_init_last:
            for block in self.modules():
                if isinstance(block, (BasicBlock, Bottleneck)):
                    block.zero_init_last()

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """As `timm.models.ResNet.forward_intermediates`, for the stem and three stages."""
        return super().forward_intermediates(
            x,
            indices=self._taps(indices),
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """As `timm.models.ResNet.prune_intermediate_layers`, for the stem and three stages."""
        taps = self._taps(indices)
        last = max(taps)
        for i in range(last + 1, 4):
            setattr(self, f'layer{i}', nn.Sequential())
        if last < 3:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or last < 3:
            self.reset_classifier(0, '')
        return taps

    @staticmethod
    def _taps(indices: Optional[Union[int, List[int]]]) -> List[int]:
        """The features meant by `indices` (the last n if int, all if None), of the stem (0) and three stages."""
        if indices is None:
            indices = 4
        taps = list(range(4 - indices, 4)) if isinstance(indices, int) else [i + 4 if i < 0 else i for i in indices]
        assert taps and all(0 <= i < 4 for i in taps), f'feature indices {indices} are out of range, there are 4'
        return taps


class AwmCifarResNet(AwmResNet, CifarResNet):
    """CifarResNet with AWM merges.

    Args:
        awm_hidden: Width e of the merges' hidden layer.
        **kwargs: As for `CifarResNet`.
    """


def _create_awm_resnet(variant: str, pretrained: bool = False, **kwargs) -> ResNet:
    kwargs.setdefault('zero_init_last', False)  # a zero F has no descriptor to weigh it by; alike in the control
    return create_awm_model(AwmResNet, ResNet, variant, pretrained, **kwargs)


def _create_awm_resnet_cifar(
        variant: str,
        blocks_per_stage: int,
        pretrained: bool = False,
        **kwargs,
) -> CifarResNet:
    return create_awm_model(
        AwmCifarResNet,
        CifarResNet,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3)),
        **dict(dict(block=BasicBlock, layers=(blocks_per_stage,) * 3, zero_init_last=False), **kwargs),
    )


CIFAR_CFG = dict(CIFAR10_CFG, first_conv='conv1', classifier='fc')

default_cfgs = generate_default_cfgs({
    **identity_cfgs('awm_resnet18'),
    **identity_cfgs('awm_resnet18d'),
    **identity_cfgs('awm_resnet26'),
    **identity_cfgs('awm_resnet26d'),
    **identity_cfgs('awm_resnet34'),
    **identity_cfgs('awm_resnet34d'),
    **identity_cfgs('awm_resnet50'),
    **identity_cfgs('awm_resnet50d'),
    **identity_cfgs('awm_resnet101'),
    **identity_cfgs('awm_resnet101d'),
    **identity_cfgs('awm_resnet152'),
    **identity_cfgs('awm_resnet152d'),
    **identity_cfgs('awm_resnext50_32x4d'),
    **identity_cfgs('awm_resnext50d_32x4d'),
    **identity_cfgs('awm_resnext101_32x4d'),
    **identity_cfgs('awm_resnext101_32x8d'),
    **identity_cfgs('awm_resnext101_32x16d'),
    **identity_cfgs('awm_resnext101_32x32d'),
    **identity_cfgs('awm_resnext101_64x4d'),
    **identity_cfgs('awm_wide_resnet50_2'),
    **identity_cfgs('awm_wide_resnet101_2'),
    'awm_resnet14_cifar.untrained': CIFAR_CFG,
    'awm_resnet20_cifar.untrained': CIFAR_CFG,
    'awm_resnet32_cifar.untrained': CIFAR_CFG,
    'awm_resnet44_cifar.untrained': CIFAR_CFG,
    'awm_resnet56_cifar.untrained': CIFAR_CFG,
    'awm_resnet110_cifar.untrained': CIFAR_CFG,
})


@register_model
def awm_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with AWM merges.
    """
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_awm_resnet('awm_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet18d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18-D with AWM merges.
    """
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnet18d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet26(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-26 with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(2, 2, 2, 2))
    return _create_awm_resnet('awm_resnet26', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet26d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-26-D with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(2, 2, 2, 2), stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnet26d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet34(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-34 with AWM merges.
    """
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_awm_resnet('awm_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet34d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-34-D with AWM merges.
    """
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnet34d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_awm_resnet('awm_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet50d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50-D with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnet50d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-101 with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_awm_resnet('awm_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet101d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-101-D with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnet101d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet152(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-152 with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3))
    return _create_awm_resnet('awm_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet152d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-152-D with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3), stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnet152d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext50_32x4d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-50 32x4d with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_awm_resnet('awm_resnext50_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext50d_32x4d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-50-D 32x4d with AWM merges.
    """
    model_args = dict(
        block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4,
        stem_width=32, stem_type='deep', avg_down=True)
    return _create_awm_resnet('awm_resnext50d_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext101_32x4d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-101 32x4d with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_awm_resnet('awm_resnext101_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext101_32x8d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-101 32x8d with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create_awm_resnet('awm_resnext101_32x8d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext101_32x16d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-101 32x16d with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=16)
    return _create_awm_resnet('awm_resnext101_32x16d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext101_32x32d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-101 32x32d with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=32)
    return _create_awm_resnet('awm_resnext101_32x32d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnext101_64x4d(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNeXt-101 64x4d with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=64, base_width=4)
    return _create_awm_resnet('awm_resnext101_64x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_wide_resnet50_2(pretrained: bool = False, **kwargs) -> ResNet:
    """Wide ResNet-50-2 with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create_awm_resnet('awm_wide_resnet50_2', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_wide_resnet101_2(pretrained: bool = False, **kwargs) -> ResNet:
    """Wide ResNet-101-2 with AWM merges.
    """
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), base_width=128)
    return _create_awm_resnet('awm_wide_resnet101_2', pretrained, **dict(model_args, **kwargs))


@register_model
def awm_resnet14_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-14 for 32x32 images with AWM merges, 2 blocks in each stage.
    """
    return _create_awm_resnet_cifar('awm_resnet14_cifar', 2, pretrained, **kwargs)


@register_model
def awm_resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20 for 32x32 images with AWM merges, 3 blocks in each stage.
    """
    return _create_awm_resnet_cifar('awm_resnet20_cifar', 3, pretrained, **kwargs)


@register_model
def awm_resnet32_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32 for 32x32 images with AWM merges, 5 blocks in each stage.
    """
    return _create_awm_resnet_cifar('awm_resnet32_cifar', 5, pretrained, **kwargs)


@register_model
def awm_resnet44_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-44 for 32x32 images with AWM merges, 7 blocks in each stage.
    """
    return _create_awm_resnet_cifar('awm_resnet44_cifar', 7, pretrained, **kwargs)


@register_model
def awm_resnet56_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56 for 32x32 images with AWM merges, 9 blocks in each stage.
    """
    return _create_awm_resnet_cifar('awm_resnet56_cifar', 9, pretrained, **kwargs)


@register_model
def awm_resnet110_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-110 for 32x32 images with AWM merges, 18 blocks in each stage.
    """
    return _create_awm_resnet_cifar('awm_resnet110_cifar', 18, pretrained, **kwargs)
