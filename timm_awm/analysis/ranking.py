"""Images ranked by how much they use the convolutions (Fig. 7)."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .figures import LEAST_SPAN, literal
from .inputs import ImageData
from .observed import Observed

SHOWN, COLUMNS = 20, 10  # images at either end, in rows of ten


def rank_images(lambdas: Mapping[str, Tensor]) -> Tuple[np.ndarray, np.ndarray]:
    """Images in ascending order of the sum over all merges of λ1, the weight of the convolutional branch.

    Args:
        lambdas: Name of the merge -> λ, (images, 2).

    Returns:
        The indices of the images in this order, and the sum of each image, (images,) both.

    Raises:
        ValueError: A merge has more than two paths, as in DenseNets: there is no convolutional branch.
    """
    if any(value.shape[1] != 2 for value in lambdas.values()):
        raise ValueError('Images are ranked by the branches of residual blocks, but a merge has more than two paths.')
    sums = np.sum([value[:, 0].double().numpy() for value in lambdas.values()], axis=0)
    return np.argsort(sums, kind='stable'), sums


def save_ranking(folder: Path, label: str, seen: Observed, data: ImageData) -> Dict[str, List[Dict[str, Any]]]:
    """Write ranking.png; returns its images: end of the ranking -> index, label and sum of each."""
    order, sums = rank_images(seen.lambdas)
    shown = min(SHOWN, len(order) // 2) or 1
    mean, std = (torch.tensor(data.config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    groups: Dict[str, List[Tuple[np.ndarray, str]]] = {}
    listed: Dict[str, List[Dict[str, Any]]] = {}
    note = ' (all within 0.05: hardly a ranking)' if np.ptp(sums) < LEAST_SPAN else ''
    for title, end in dict(lowest=order, highest=order[::-1]).items():
        group = groups[f'{label}: {title} sums of λ1{note}'] = []
        listed[title] = []
        for i in end[:shown].tolist():
            number = int(seen.labels[i])
            name = data.class_names.get(number, str(number)) if seen.labelled else None
            listed[title].append(dict(index=int(data.indices[i]), label=name, sum=float(sums[i])))
            pixels = (data.loader.dataset[i][0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
            group.append((pixels, f'{name or data.indices[i]}\n{sums[i]:.3f}'))
    plot_contact_sheet(groups).savefig(folder / 'ranking.png', dpi=120)
    return listed


def plot_contact_sheet(groups: Mapping[str, Sequence[Tuple[np.ndarray, str]]]) -> Figure:
    """Draw groups of images by their titles; images are (height, width, 1 or 3) from 0 to 1, each with its caption."""
    rows = [-(-len(group) // COLUMNS) for group in groups.values()]
    figure = Figure(figsize=(1.3 * COLUMNS, sum(1.75 * n + 0.5 for n in rows)), layout='constrained')
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)
    for part, count, (title, group) in zip(parts[:, 0], rows, groups.items()):
        part.suptitle(literal(title, 100))
        axes = part.subplots(count, COLUMNS, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for ax, (image, caption) in zip(axes, group):
            ax.imshow(image, cmap='gray', vmin=0, vmax=1)
            ax.set_title('\n'.join(literal(line, 20, lines=2) for line in caption.splitlines()), fontsize=7)
    return figure
