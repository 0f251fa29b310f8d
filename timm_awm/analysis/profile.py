"""How the weights vary over the depth of a network (Fig. 6), from image to image and with the class."""
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from torch import Tensor

__all__ = [
    'Profile', 'profile', 'class_means', 'between_class_share', 'plot_profile', 'plot_profiles', 'plot_path_profile',
    'plot_paths', 'plot_class_means', 'depth_figure', 'label_merges', 'short_name']

MERGES = 'merge, from the input to the output of the network'


class Profile(NamedTuple):
    """Of one merge, over the images (Fig. 6), (paths,) each."""
    mean: np.ndarray
    std: np.ndarray


def profile(lambdas: Mapping[str, Tensor]) -> Dict[str, Profile]:
    """Mean and standard deviation of every λ.

    Args:
        lambdas: Name of the merge -> (images, paths), as from `observe`.

    Returns:
        Name of the merge -> its profile, in the same order.
    """
    return {name: Profile(value.double().mean(0).numpy(), value.double().std(0, correction=0).numpy())
            for name, value in lambdas.items()}


def class_means(values: np.ndarray, labels: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of each class.

    Args:
        values: (images, features).
        labels: (images,), whole numbers.

    Returns:
        The classes that there are, ascending, (classes,); the images of each, (classes,); their means,
        (classes, features).
    """
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(classes), values.shape[1]))
    np.add.at(sums, index, values)
    return classes, counts, sums / counts[:, None]


def between_class_share(values: np.ndarray, labels: np.ndarray) -> float:
    """The share of the variance that lies between the classes: that of their means, of all.

    Labels drawn at random would have (classes - 1) / (images - 1) on average.

    Args:
        values: (images, features); the variances of several features are summed.
        labels: (images,), whole numbers.

    Returns:
        From 0 to 1; NaN if all images have the same values.
    """
    values = values.astype(np.float64)
    if not np.ptp(values, axis=0).any():  # the rounding of a mean would have a variance
        return float('nan')
    _, counts, means = class_means(values, labels)
    mean = values.mean(0)
    return float((counts[:, None] * (means - mean) ** 2).sum() / ((values - mean) ** 2).sum())


def plot_profile(lambdas: Dict[str, Tensor], ax: Axes, label: str = 'mean ± one standard deviation') -> None:
    """Draw the mean of λ1, the weight of the convolutional branch, over the merges of a ResNet, and in a band around it
    the standard deviation over the images (Fig. 6: the variance).

    Args:
        lambdas: Name of the merge -> (images, 2), as from `observe`.
        ax: Where to draw; call again to draw another model into the same axes.
        label: Names the model in the legend.
    """
    mean, std = np.array([(found.mean[0], found.std[0]) for found in profile(lambdas).values()]).T
    merges = range(1, len(lambdas) + 1)
    line, = ax.plot(merges, mean, marker='o', label=label)
    ax.fill_between(merges, mean - std, mean + std, color=line.get_color(), alpha=0.2)
    label_merges(ax, [list(lambdas)])
    ax.set_ylabel('λ1, the weight of the convolutions F(x)\n(the shortcut has 1 − λ1)')


def plot_profiles(models: Mapping[str, Dict[str, Tensor]]) -> Figure:
    """Draw the profiles of several ResNets into one figure (Fig. 6).

    Args:
        models: Label of the model -> its λ, as for `plot_profile`.
    """
    figure, ax = depth_figure(max(map(len, models.values())))
    for label, lambdas in models.items():
        plot_profile(lambdas, ax, label)
    label_merges(ax, [list(lambdas) for lambdas in models.values()])
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
    found = profile(lambdas)
    means, stds = ({name: getattr(values, what) for name, values in found.items()} for what in ('mean', 'std'))
    return plot_paths({'mean': means}, label, stds)


def plot_paths(
        maps: Mapping[str, Mapping[str, np.ndarray]],
        label: str,
        stds: Optional[Mapping[str, np.ndarray]] = None,
) -> Figure:
    """Draw n · λ of the n paths of each merge as heat maps.

    Args:
        maps: Title -> name of the merge -> λ, (paths,).
        label: Names the model in the title.
        stds: Their standard deviations over the images, for a last heat map.
    """
    names = list(next(iter(maps.values())))
    grids = {title: _grid(values) for title, values in maps.items()}
    spread = max(np.nanmax(np.abs(grid - 1)) for grid in grids.values()) or 1.
    colors: Dict[str, Dict[str, Any]] = {
        title: dict(cmap='RdBu_r', vmin=1 - spread, vmax=1 + spread) for title in grids}
    if stds is not None:
        title = 'standard deviation over the images'
        grids[title], colors[title] = _grid(stds), dict(cmap='viridis', vmin=0)
    paths = next(iter(grids.values())).shape[1]
    rows = 1 if len(grids) < 3 else 2
    columns = (len(grids) + 1) // rows
    size = 1 + columns * (4 + 0.15 * paths), rows * (2 + 0.2 * len(names))
    figure = Figure(figsize=size, layout='constrained')
    figure.suptitle(f'{label}: n · λ of the n paths of each merge (1 at the identity)')
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for ax in axes[len(grids):]:
        ax.remove()
    for ax, (title, grid) in zip(axes, grids.items()):
        image = ax.imshow(grid, aspect='auto', extent=(.5, paths + .5, len(names) + .5, .5), **colors[title])
        figure.colorbar(image, ax=ax)
        ax.set_title(title)
        ax.set_xlabel("path (1: the block's input)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_yticks(range(1, len(names) + 1), [short_name(name) for name in names])
    return figure


def _grid(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """n · λ, (merges, most paths), NaN where a merge has fewer."""
    grid = np.full((len(values), max(map(len, values.values()))), np.nan)
    for row, of_merge in enumerate(values.values()):
        grid[row, :len(of_merge)] = len(of_merge) * of_merge
    return grid


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
    ax.set_xticks(first, [short_name(name) for name in lambdas], rotation=90)
    ax.set_xlabel(MERGES)
    weights = 'λ1' if set(paths) == {2} else 'λ of every path'
    ax.set_title(f'{label}\nmean {weights} of a class, less the mean of all')
    return figure


def depth_figure(merges: int) -> Tuple[Figure, Axes]:
    """A figure wide enough for so many merges."""
    figure = Figure(figsize=(max(8, 0.2 * merges), 5), layout='constrained')
    return figure, figure.subplots()


def label_merges(ax: Axes, models: Sequence[Sequence[str]]) -> None:
    """Ticks of the merges: by name where all models have the same, else by number."""
    names = models[0]
    ax.set_xticks(range(1, len(names) + 1), [short_name(name) for name in names], rotation=45, ha='right')
    ax.set_xlabel(MERGES)
    if any(other != names for other in models):
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_major_locator(MaxNLocator(20, integer=True))
        ax.tick_params(axis='x', rotation=0)


def short_name(name: str) -> str:
    """Of a merge, for figures."""
    return name.removesuffix('.merge').removeprefix('features.')
