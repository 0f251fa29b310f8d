"""Mixing weights over the depth of a network (Fig. 6), by image and by class."""
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .figures import HARDLY, LEAST_SPAN, depth_figure, label_merges, literal, short_name, widen


class Profile(NamedTuple):
    """Mean and standard deviation of λ of one merge over the images, (paths,) each."""
    mean: np.ndarray
    std: np.ndarray


Profiles = Mapping[str, Profile]  # by the name of the merge, in order of execution


def profile_merges(lambdas: Mapping[str, Tensor]) -> Dict[str, Profile]:
    """Mean and standard deviation of λ, (images, paths), by the name of the merge, over the images."""
    return {name: Profile(value.double().mean(0).numpy(), value.double().std(0, correction=0).numpy())
            for name, value in lambdas.items()}


def between_class_share(values: np.ndarray, labels: np.ndarray) -> Optional[float]:
    """The share of the variance that lies between the classes: that of their means, of all.

    Labels drawn at random would have (classes - 1) / (images - 1) on average.

    Args:
        values: (images, features); the variances of several features are summed.
        labels: (images,), whole numbers.

    Returns:
        From 0 to 1; None if all images have the same values.
    """
    values = values.astype(np.float64)
    if not np.ptp(values, axis=0).any():  # the rounding of a mean would have a variance
        return None
    deviations = values - values.mean(0)
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(index, feature) for feature in deviations.T])
    return float((sums ** 2 / counts).sum() / (deviations ** 2).sum())


def plot_profiles(models: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw the mean of λ1, the weight of the convolutional branch, over the merges of ResNets, and in a band around it
    the standard deviation over the images (Fig. 6: the variance).

    Args:
        models: Label of the model -> name of the merge -> (images, 2), as from `observe`.
    """
    return plot_depth({label: profile_merges(lambdas) for label, lambdas in models.items()})


def plot_depth(lines: Mapping[str, Profiles]) -> Figure:
    """Draw profiles of ResNets by their labels, as `plot_profiles` does."""
    figure, ax = depth_figure(max(map(len, lines.values())))
    for label, profiles in lines.items():
        mean, std = np.array([(found.mean[0], found.std[0]) for found in profiles.values()]).T
        merges = range(1, len(profiles) + 1)
        line, = ax.plot(merges, mean, marker='o', label=literal(label))
        ax.fill_between(merges, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    label_merges(ax, [list(profiles) for profiles in lines.values()])
    ax.axhline(0.5, color='black', linestyle='--', label='plain: both weigh the same')
    ax.set_ylabel('λ1, the weight of the convolutions F(x)\n(the shortcut has 1 − λ1)')
    title = 'λ1 over the depth (bands: one standard deviation)'
    ax.set_title(f'{title}\n{HARDLY}' if widen(ax) else title)
    ax.legend()
    return figure


def plot_paths(maps: Mapping[str, Profiles], label: str, spread: Optional[Profiles] = None) -> Figure:
    """Draw n · λ of the n paths of each merge as heat maps of means.

    Args:
        maps: Title -> profiles.
        label: Names the model in the title.
        spread: Profiles whose standard deviations are a last heat map.
    """
    names = list(next(iter(maps.values())))
    grids = {title: _grid([found.mean for found in profiles.values()]) for title, profiles in maps.items()}
    farthest = max(np.nanmax(np.abs(grid - 1)) for grid in grids.values())
    limit = max(farthest, LEAST_SPAN)
    styles: List[Dict[str, Any]] = [dict(cmap='RdBu_r', vmin=1 - limit, vmax=1 + limit)] * len(grids)
    if spread is not None:
        grids['standard deviation over the images'] = grid = _grid([found.std for found in spread.values()])
        styles.append(dict(cmap='viridis', vmin=0, vmax=max(np.nanmax(grid), LEAST_SPAN)))
    paths = next(iter(grids.values())).shape[1]
    rows = 1 if len(grids) < 3 else 2
    columns = -(-len(grids) // rows)
    size = 1 + columns * (4 + 0.15 * paths), rows * (2 + 0.2 * len(names))
    figure = Figure(figsize=size, layout='constrained')
    title = f'{literal(label)}\nn · λ of the n paths of each merge (1 at the identity)'
    figure.suptitle(f'{title}\n{HARDLY}' if farthest < LEAST_SPAN else title)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for ax in axes[len(grids):]:
        ax.remove()
    for ax, (title, grid), style in zip(axes, grids.items(), styles):
        image = ax.imshow(grid, aspect='auto', extent=(.5, paths + .5, len(names) + .5, .5), **style)
        bar = figure.colorbar(image, ax=ax).ax
        bar.set_ylim(bottom=max(0, style['vmin']))  # no λ is below 0
        bar.ticklabel_format(style='plain', useOffset=False)
        ax.set_title(literal(title, 40))
        ax.set_xlabel("path (1: the block's input)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yticks(range(1, len(names) + 1), [short_name(name) for name in names])
    return figure


def _grid(values: Sequence[np.ndarray]) -> np.ndarray:
    """n · λ, (merges, most paths), NaN where a merge has fewer."""
    rows = [torch.from_numpy(len(of_merge) * of_merge) for of_merge in values]
    return pad_sequence(rows, batch_first=True, padding_value=np.nan).numpy()
