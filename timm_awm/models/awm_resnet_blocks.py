"""The blocks of timm's ResNets with a merge in place of the sum: timm's own forward passes but for their ends."""
from typing import Any, List, Optional, Tuple

import torch
from timm.models import BasicBlock, Bottleneck
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.sknet import SelectiveKernelBasic, SelectiveKernelBottleneck
from torch import Tensor, nn

from ..layers import SumMerge
from .builder import AWM_BLOCKS


class SumBlock(nn.Module):
    """Mixin of the blocks that end in a sum."""

    @staticmethod
    def make_merges(block: nn.Module, **kwargs: Any) -> List[Tuple[nn.Module, nn.Module]]:
        """Makes the merge of a block, and says where it goes."""
        last: Any = block.conv3 if hasattr(block, 'conv3') else block.conv2
        weight = next(last.parameters())
        return [(block, SumMerge(last.out_channels, device=weight.device, dtype=weight.dtype, **kwargs))]

    def merged(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The end of a block between its last norm and its last activation: both (batch, channels, height, width)."""
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.merge(x, shortcut)

    def fused_end(self, x: Tensor, shortcut: Tensor, conv: Any, norm: Any, act: Any) -> Optional[Tensor]:
        """act(merged(norm(x), shortcut)), x from the last convolution, conv, fused; None where it cannot be."""
        if self.se is not None or self.drop_path is not None or not isinstance(self.merge, SumMerge):
            return None
        return self.merge.fused(x, shortcut, norm, act, conv)


class AwmBasicBlock(SumBlock, BasicBlock):
    """timm's BasicBlock with a merge."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        x = self.conv2(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if not torch.jit.is_scripting():
            fused = self.fused_end(x, shortcut, self.conv2, self.bn2, self.act2)
            if fused is not None:
                return fused
        return self.act2(self.merged(self.bn2(x), shortcut))


class AwmBottleneck(SumBlock, Bottleneck):
    """timm's Bottleneck with a merge."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        x = self.conv3(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if not torch.jit.is_scripting():
            fused = self.fused_end(x, shortcut, self.conv3, self.bn3, self.act3)
            if fused is not None:
                return fused
        return self.act3(self.merged(self.bn3(x), shortcut))


class AwmBottle2neck(SumBlock, Bottle2neck):
    """Res2Net's block with a merge."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)

        splits = torch.split(x, self.width, 1)
        outs = []
        out = splits[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            out = splits[i] if i == 0 or self.is_first else out + splits[i]
            out = conv(out)
            out = bn(out)
            out = self.relu(out)
            outs.append(out)
        if self.scale > 1:
            outs.append(splits[-1] if self.pool is None else self.pool(splits[-1]))
        x = torch.cat(outs, 1)
        x = self.drop_block(x)

        x = self.conv3(x)
        x = self.bn3(x)
        return self.relu(self.merged(x, shortcut))


class AwmResNestBottleneck(SumBlock, ResNestBottleneck):
    """ResNeSt's block with a merge."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.act1(out)
        if self.avd_first is not None:
            out = self.avd_first(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.drop_block(out)
        out = self.act2(out)
        if self.avd_last is not None:
            out = self.avd_last(out)

        out = self.conv3(out)
        out = self.bn3(out)
        if self.drop_path is not None:
            x = self.drop_path(x)  # as in timm: of the input of downsample alone
        if self.downsample is not None:
            shortcut = self.downsample(x)
        return self.act3(self.merge(out, shortcut))


class SelectiveKernelBlock(SumBlock):
    """Mixin of the blocks of selective kernel networks."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(x)
        x = self.conv2(x)
        if hasattr(self, 'conv3'):
            x = self.conv3(x)
        return self.act(self.merged(x, shortcut))


class AwmSelectiveKernelBasic(SelectiveKernelBlock, SelectiveKernelBasic):
    """The basic block of selective kernel networks with a merge."""


class AwmSelectiveKernelBottleneck(SelectiveKernelBlock, SelectiveKernelBottleneck):
    """The bottleneck block of selective kernel networks with a merge."""


AWM_BLOCKS.update({
    BasicBlock: AwmBasicBlock, Bottleneck: AwmBottleneck, Bottle2neck: AwmBottle2neck,
    ResNestBottleneck: AwmResNestBottleneck, SelectiveKernelBasic: AwmSelectiveKernelBasic,
    SelectiveKernelBottleneck: AwmSelectiveKernelBottleneck})
