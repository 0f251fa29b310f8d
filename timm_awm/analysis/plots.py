"""Figures of what the merges do, after the paper's. They are matplotlib's own objects, made without pyplot."""
from typing import TYPE_CHECKING, Dict, Mapping, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from torch import Tensor

from .observe import Ablation
from .statistics import profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    'plot_profile', 'plot_profiles', 'plot_path_profile', 'plot_class_means', 'plot_ablations',
    'plot_cumulative_matches', 'plot_contact_sheet']

MERGES = 'merge, from the input to the output of the network'


def plot_profile(lambdas: Dict[str, Tensor], ax: 'Axes', label: str = 'mean ± one standard deviation') -> None:
    """Draw the mean of λ1, the weight of the convolutional branch, over the merges of a ResNet, and in a band around it
    the standard deviation over the images (Fig. 6).

    Args:
        lambdas: Name of the merge -> (images, 2), as from `observe`.
        ax: Where to draw; call again to draw another model into the same axes.
        label: Names the model in the legend.
    """
    branch = torch.stack([value[:, 0] for value in lambdas.values()], dim=1)
    mean, std = branch.mean(0), branch.std(0, correction=0)
    merges = range(1, len(lambdas) + 1)
    line, = ax.plot(merges, mean, marker='o', label=label)
    ax.fill_between(merges, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    _name_merges(ax, list(lambdas))
    ax.set_ylabel('λ1, the weight of the convolutions F(x)\n(the shortcut has 1 − λ1)')


def plot_profiles(models: Mapping[str, Dict[str, Tensor]]) -> Figure:
    """Draw the profiles of several ResNets into one figure (Fig. 6).

    Args:
        models: Label of the model -> its λ, as for `plot_profile`.
    """
    figure, ax = _figure(max(map(len, models.values())))
    for label, lambdas in models.items():
        plot_profile(lambdas, ax, label)
    _number_merges(ax, [list(lambdas) for lambdas in models.values()])
    ax.axhline(0.5, color='gray', linestyle='--', label='plain: both weigh the same')
    ax.set_title('λ1 over the depth, mean ± one standard deviation over the images')
    ax.legend()
    return figure


def plot_path_profile(lambdas: Dict[str, Tensor], label: str) -> Figure:
    """Draw, of a network whose merges weigh any number n of paths, mean and standard deviation of n · λ.

    Args:
        lambdas: Name of the merge -> (images, paths), as from `observe`.
        label: Names the model in the title.
    """
    paths = max(value.shape[1] for value in lambdas.values())
    maps = np.full((2, len(lambdas), paths), np.nan)
    for row, of_merge in enumerate(profile(lambdas).values()):
        n = len(of_merge.mean)
        maps[:, row, :n] = n * of_merge.mean, n * of_merge.std
    figure = Figure(figsize=(9 + 0.3 * paths, 2 + 0.2 * len(lambdas)), layout='constrained')
    figure.suptitle(f'{label}: n · λ of the n paths of each merge (1 at the identity)')
    spread = np.nanmax(np.abs(maps[0] - 1)) or 1.
    axes = figure.subplots(1, 2, sharey=True)
    for ax, values, title, colors in zip(axes, maps, ('mean', 'standard deviation over the images'), (
            dict(cmap='RdBu_r', vmin=1 - spread, vmax=1 + spread), dict(cmap='viridis', vmin=0))):
        image = ax.imshow(values, aspect='auto', extent=(.5, paths + .5, len(lambdas) + .5, .5), **colors)
        figure.colorbar(image, ax=ax)
        ax.set_title(title)
        ax.set_xlabel("path (1: the block's input)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yticks(range(1, len(lambdas) + 1), [_short(name) for name in lambdas])
    return figure


def plot_class_means(means: np.ndarray, classes: Sequence[str], lambdas: Dict[str, Tensor], label: str) -> Figure:
    """Draw how far the mean λ of each class is from the mean of all of them.

    Args:
        means: Those of all λ side by side, (classes, sum of paths).
        classes: Names.
        lambdas: Name of the merge -> (images, paths), as from `observe`.
        label: Names the model in the title.
    """
    paths = [value.shape[1] for value in lambdas.values()]
    first = np.cumsum([0, *paths[:-1]])
    values = means - means.mean(0)
    if set(paths) == {2}:  # the other is its opposite
        values, first = values[:, ::2], first // 2
    figure = Figure(
        figsize=(4 + min(0.25 * values.shape[1], 16), 3 + min(0.2 * len(values), 20)), layout='constrained')
    ax = figure.subplots()
    limit = np.abs(values).max() or 1.
    image = ax.imshow(values, aspect='auto', cmap='RdBu_r', vmin=-limit, vmax=limit, interpolation='nearest')
    figure.colorbar(image, ax=ax)
    if len(classes) <= 100:  # else they cannot be read
        ax.set_yticks(range(len(classes)), classes)
    ax.set_xticks(first, [_short(name) for name in lambdas], rotation=90)
    ax.set_xlabel(MERGES)
    weights = 'λ1' if set(paths) == {2} else 'λ of every path'
    ax.set_title(f'{label}\nmean {weights} of a class, less the mean of all')
    return figure


def plot_ablations(models: Mapping[str, Ablation]) -> Figure:
    """Draw what accuracy is lost with each merge, and with all, at the identity, and with every λ at its mean.

    Args:
        models: Label of the model -> the result of `ablate`.
    """
    figure, ax = _figure(max(len(ablation.merges) for ablation in models.values()))
    for label, (top1, constant, without_all, merges) in models.items():
        line, = ax.plot(
            range(1, len(merges) + 1), [value - top1 for value in merges.values()], marker='o',
            label=f'{label} ({top1:.2f} %), one merge at the identity')
        ax.axhline(
            constant - top1, color=line.get_color(), linestyle=':', label=f'{label}, every λ at its mean')
        ax.axhline(
            without_all - top1, color=line.get_color(), linestyle='--', label=f'{label}, all merges at the identity')
    _number_merges(ax, [list(ablation.merges) for ablation in models.values()])
    ax.set_ylabel('change of the top-1 accuracy, points')
    ax.set_title('Merges held constant after training; at the identity: λ = 1/n')
    ax.legend()
    return figure


def plot_cumulative_matches(curves: Mapping[str, np.ndarray]) -> Figure:
    """Draw cumulative match over rank (Fig. 10).

    Args:
        curves: Label -> percent for the ranks from 1 on, as from `cumulative_match`.
    """
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    for label, curve in curves.items():
        ax.plot(range(1, len(curve) + 1), curve, marker='o', label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel('rank k')
    ax.set_ylabel('the class is among the k nearest means, % of the images')
    ax.set_title('PCA + LDA and class means')
    ax.legend()
    return figure


def plot_contact_sheet(groups: Mapping[str, Sequence[Tuple[np.ndarray, str]]], columns: int = 10) -> Figure:
    """Draw images with captions (Fig. 7).

    Args:
        groups: Title of a group -> its images, (height, width, 1 or 3) from 0 to 1, each with its caption.
        columns: Images in a row.
    """
    rows = [-(-len(group) // columns) for group in groups.values()]
    figure = Figure(figsize=(1.3 * columns, sum(1.75 * n + 0.5 for n in rows)), layout='constrained')
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)
    for part, count, (title, group) in zip(parts[:, 0], rows, groups.items()):
        part.suptitle(title)
        axes = part.subplots(count, columns, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for ax, (image, caption) in zip(axes, group):
            ax.imshow(image, cmap='gray', vmin=0, vmax=1)
            ax.set_title(caption, fontsize=7)
    return figure


def _figure(merges: int) -> Tuple[Figure, 'Axes']:
    figure = Figure(figsize=(max(8, 0.2 * merges), 5), layout='constrained')
    return figure, figure.subplots()


def _short(name: str) -> str:
    return name.removesuffix('.merge').removeprefix('features.')


def _name_merges(ax: 'Axes', names: Sequence[str]) -> None:
    ax.set_xticks(range(1, len(names) + 1), [_short(name) for name in names], rotation=45, ha='right')
    ax.set_xlabel(MERGES)


def _number_merges(ax: 'Axes', models: Sequence[Sequence[str]]) -> None:
    """By name where all models have the same merges, else by number."""
    _name_merges(ax, models[0])
    if any(names != models[0] for names in models):
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        ax.tick_params(axis='x', rotation=0)
