"""The accuracy that a trained network loses when its merges are held constant."""
from typing import ContextManager, Dict, Mapping, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..layers.record import find_merges, hook_merges
from .figures import depth_figure, label_merges, literal, widen
from .observed import Batches


class Ablation(NamedTuple):
    """Top-1 accuracies in percent."""
    top1: float  # the network as it is
    constant: float  # every λ at its mean over the images
    all: float  # all merges at the identity, λ = 1/n: plain sums and concatenations
    merges: Dict[str, float]  # name of the merge -> it alone at the identity, in order of execution


def ablate(model: nn.Module, batches: Batches, lambdas: Mapping[str, Tensor]) -> Ablation:
    """Accuracy with every λ at its mean, and with merges set back to the identity: each alone, and all.

    Args:
        model: A model with merges; it is put into eval mode.
        batches: Each goes through the network once for every merge, and three times more.
        lambdas: Name of the merge -> λ, (images, paths), for the means: `observe(...).lambdas`.

    Raises:
        ValueError: The model has no merge, or there are no images.
    """
    device = next(model.parameters()).device
    mixes = find_merges(model)
    means = {name: mix.num_paths * lambdas[name].mean(0) for name, mix in mixes.items()}
    ones = {name: torch.ones(mix.num_paths) for name, mix in mixes.items()}
    variants = [{}, means, ones, *({name: scales} for name, scales in ones.items())]
    correct, count = [0] * len(variants), 0

    def held(scales: Mapping[str, Tensor]) -> ContextManager[None]:
        """Gives merges n · λ, (paths,), the same for every image."""
        held_mixes = {name: mixes[name] for name in scales}
        return hook_merges(held_mixes, lambda name, _, own: scales[name].to(own).expand_as(own))

    model.eval()
    for images, target in batches:
        images, target = images.to(device), target.to(device)
        count += len(target)
        for i, scales in enumerate(variants):
            with held(scales), torch.inference_mode():
                correct[i] += int((model(images).argmax(1) == target).sum())
    if not count:
        raise ValueError('There are no images.')
    top1, constant, without_all, *without_one = (100 * n / count for n in correct)
    return Ablation(top1, constant, without_all, dict(zip(mixes, without_one)))


def plot_ablations(models: Mapping[str, Ablation]) -> Figure:
    """Draw, for models by their labels, the accuracy lost with merges at the identity and with every λ at its mean."""
    figure, ax = depth_figure(max(len(ablation.merges) for ablation in models.values()))
    for label, (top1, constant, without_all, merges) in models.items():
        lost = [value - top1 for value in merges.values()]
        title = literal(f'{label} ({top1:.2f} %), one merge at the identity')
        line, = ax.plot(range(1, len(merges) + 1), lost, marker='o', label=title)
        for value, style, what in ((constant, ':', 'every λ at its mean'), (without_all, '--', 'all at the identity')):
            ax.axhline(value - top1, color=line.get_color(), linestyle=style, label=literal(f'{label}, {what}'))
    label_merges(ax, [list(ablation.merges) for ablation in models.values()])
    ax.set_ylabel('change of the top-1 accuracy, points')
    widen(ax, 1)
    ax.set_title('Merges held constant after training; at the identity: λ = 1/n')
    ax.legend()
    return figure
