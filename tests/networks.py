"""Networks and images for the tests of the models."""
import timm
import torch
from torch import Tensor, nn

import timm_awm  # noqa: F401
from timm_awm.layers import ConcatMerge, MixingWeights, SumMerge

# one of each kind, small enough to run
SMALL = ['awm_resnet14_cifar', 'awm_densenet22_cifar', 'awm_resnet18', 'awm_resnet26d']


def trained(model: nn.Module) -> nn.Module:
    """With its merges away from the identity."""
    for m in model.modules():
        if isinstance(m, MixingWeights):
            nn.init.normal_(m.weight2)
    return model


def create(name: str, away: bool = False, seed: int = 0, **kwargs) -> nn.Module:
    """A model; away moves its merges from the identity."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    return trained(model) if away else model


def vary_norms(model: nn.Module) -> nn.Module:
    """With scales, shifts and statistics of its BatchNorms away from where they start, so that no path is zero."""
    torch.manual_seed(2)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


def images(batch: int = 2, size: int = 32, chans: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def merges(model: nn.Module) -> list:
    return [m for m in model.modules() if isinstance(m, (SumMerge, ConcatMerge))]
