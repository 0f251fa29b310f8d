"""The mixing weights over the depth of a network (the paper's Fig. 6)."""
from typing import TYPE_CHECKING, Dict, Iterable, List

import torch
from torch import Tensor, nn

from ..layers import record_mixing_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['collect_mixing_weights', 'plot_profile']


@torch.inference_mode()
def collect_mixing_weights(model: nn.Module, images: Iterable[Tensor]) -> Dict[str, Tensor]:
    """λ of every merge for every image.

    Args:
        model: A model with merges; evaluated in eval mode, every module is left in the mode that it was in.
        images: Batches, (batch, in_chans, height, width), on the model's device.

    Returns:
        Name of the merge -> (images, paths) on the CPU, in order of execution.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    batches: Dict[str, List[Tensor]] = {}
    try:
        with record_mixing_weights(model) as lambdas:
            for batch in images:
                model(batch)
                for name, value in lambdas.items():
                    batches.setdefault(name, []).append(value.cpu())
    finally:
        for module in training:
            module.training = True
    return {name: torch.cat(values) for name, values in batches.items()}


def plot_profile(lambdas: Dict[str, Tensor], ax: 'Axes', label: str = 'mean ± one standard deviation') -> None:
    """Draw the mean of λ1, the weight of the convolutional branch, over the merges of a ResNet, and in a band around it
    the standard deviation over the images.

    Args:
        lambdas: Name of the merge -> (images, 2), as from `collect_mixing_weights`.
        ax: Where to draw; call again to draw another model into the same axes.
        label: Names the model in the legend.
    """
    branch = torch.stack([value[:, 0] for value in lambdas.values()], dim=1)
    mean, std = branch.mean(0), branch.std(0, correction=0)
    merges = range(1, len(lambdas) + 1)
    line, = ax.plot(merges, mean, marker='o', label=label)
    ax.fill_between(merges, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    ax.set_xticks(merges, [name.removesuffix('.merge') for name in lambdas], rotation=45, ha='right')
    ax.set_xlabel('merge, from the input to the output of the network')
    ax.set_ylabel('λ1, the weight of the convolutions F(x)\n(the shortcut has 1 − λ1)')
