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
from functools import partial
from typing import Any, Dict, List, Optional, Tuple, Union

from timm.models import BasicBlock, Bottleneck, ResNet
from timm.models._features import feature_take_indices  # private: there is no other
from torch import Tensor, nn

from . import awm_resnet_blocks  # noqa: F401
from .builder import AWM_CLASSES, CIFAR10_CFG, AwmModel, register_awm_model


class AwmResNet(AwmModel, ResNet):
    """timm's ResNet with AWM merges."""


class CifarResNet(ResNet):
    """The ResNet of 6n + 2 layers for 32x32 images, of timm's blocks: a 3x3 stem and three stages of strides 1, 2, 4.

    Args:
        **kwargs: As for `timm.models.ResNet`, but those of the stem; output_stride is 4 times the network's.
    """

    def __init__(
            self, *args: Any, in_chans: int = 3, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        # timm's stem and strides are made for large images: build with those, four times too coarse, then correct
        super().__init__(
            *args,
            in_chans=in_chans,
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
        for name in ('global_pool', 'fc'):  # behind it, as in timm's ResNet
            self.add_module(name, self._modules.pop(name))
        self.feature_info[0]['reduction'] = 1
        for info in self.feature_info[1:]:
            info['reduction'] //= 4

    def init_weights(self, zero_init_last: bool = False) -> None:
        """PyTorch's own initialisation, as in the authors' code (docs/method.md)."""
        if zero_init_last:
            for block in self.modules():
                if isinstance(block, (BasicBlock, Bottleneck)):
                    block.zero_init_last()

    def forward_intermediates(
            self, x: Tensor, indices: Optional[Union[int, List[int]]] = None, **kwargs: Any,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Works as `timm.models.ResNet.forward_intermediates`, for the stem and three stages."""
        return super().forward_intermediates(x, feature_take_indices(4, indices)[0], **kwargs)

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Works as `timm.models.ResNet.prune_intermediate_layers`, for the stem and three stages."""
        taps, last = feature_take_indices(4, indices)
        if last < 3 or prune_head:
            super().prune_intermediate_layers(taps, prune_norm, prune_head)
        return taps


class AwmCifarResNet(AwmResNet, CifarResNet):
    """CifarResNet with AWM merges."""


AWM_CLASSES.update({ResNet: AwmResNet, CifarResNet: AwmCifarResNet})

default_cfgs: Dict[str, Any] = {}
# zero_init_last would make F zero, which leaves no descriptor to weigh it by; alike in the control
_register = partial(register_awm_model, globals(), zero_init_last=False)

for _name in (
    'awm_resnet18', 'awm_resnet26', 'awm_resnet34', 'awm_resnet50', 'awm_resnet101', 'awm_resnet152',
    'awm_resnet18d', 'awm_resnet26d', 'awm_resnet34d', 'awm_resnet50d', 'awm_resnet101d', 'awm_resnet152d',
    'awm_resnext50_32x4d', 'awm_resnext50d_32x4d', 'awm_resnext101_32x4d', 'awm_resnext101_32x8d',
    'awm_resnext101_32x16d', 'awm_resnext101_32x32d', 'awm_resnext101_64x4d',
    'awm_wide_resnet50_2', 'awm_wide_resnet101_2',
):
    _register(_name)

for _name, _blocks in {  # in each of three stages
    'awm_resnet14_cifar': 2, 'awm_resnet20_cifar': 3, 'awm_resnet32_cifar': 5,
    'awm_resnet44_cifar': 7, 'awm_resnet56_cifar': 9, 'awm_resnet110_cifar': 18,
}.items():
    _register(
        _name,
        partial(CifarResNet, block=BasicBlock, layers=(_blocks,) * 3),
        dict(CIFAR10_CFG, first_conv='conv1', classifier='fc'),
        feature_cfg=dict(out_indices=(0, 1, 2, 3)),
    )
