"""How well the classes can be told apart by the mixing weights alone (section 4.4 and Fig. 10)."""
from typing import Iterable, Mapping, Optional, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor

from .figures import literal, widen
from .observed import Batches

__all__ = ['as_features', 'cumulative_match', 'reduce_pixels', 'plot_cumulative_matches']

COMPONENTS = 30  # the paper's number
RANKS = 10
PIXEL_BATCH = 256  # images, at least: enough for the principal components to settle


def as_features(lambdas: Mapping[str, Tensor]) -> np.ndarray:
    """All λ side by side, without the last of each merge, which follows from the others.

    Args:
        lambdas: Name of the merge -> λ, (images, paths).
    """
    return np.concatenate([value[:, :-1].double().numpy() for value in lambdas.values()], axis=1)


def cumulative_match(
        train: np.ndarray,
        train_labels: np.ndarray,
        test: np.ndarray,
        test_labels: np.ndarray,
        components: int = COMPONENTS,
        ranks: int = RANKS,
) -> np.ndarray:
    """How often the class of an image is among the k nearest class means after PCA and LDA.

    PCA reduces the features to `components`; LDA turns these into as many, or one less than there are classes if that
    is less. (The paper says only that both together lead to 30 dimensions.) Distances are Euclidean.

    Args:
        train, test: (images, features).
        train_labels, test_labels: (images,).
        components: Dimensions; less where there are fewer features, images or classes.
        ranks: The largest k; less where there are fewer classes.

    Returns:
        Percent of the test images for k from 1 on, (ranks,).

    Raises:
        ValueError: A class of the test images has no training image, there is one class only, no class has two images,
            or all features are constant.
    """
    classes = np.unique(train_labels)
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise ValueError(f'There are no training images of class {unknown[0]}: take more of them.')
    if len(classes) < 2 or not np.ptp(train, axis=0).any():
        raise ValueError('LDA needs two classes or more, and features that differ between training images.')
    pca = PCA(min(components, *train.shape), random_state=0).fit(train)
    # LDA scales to equal variance, rounding errors too
    kept = int((pca.explained_variance_ > 1e-12 * np.square(train).mean()).sum())
    lda = LinearDiscriminantAnalysis().fit(pca.transform(train)[:, :kept], train_labels)
    distances = euclidean_distances(lda.transform(pca.transform(test)[:, :kept]), lda.transform(lda.means_))
    own = np.take_along_axis(distances, np.searchsorted(classes, test_labels)[:, None], axis=1)
    nearer = (distances < own).sum(1)
    return np.array([100 * np.mean(nearer < k) for k in range(1, min(ranks, len(classes)) + 1)])


def reduce_pixels(train: Batches, test: Batches, components: int = COMPONENTS) -> Tuple[np.ndarray, np.ndarray]:
    """Principal components of the images of train and of test, (images, components) each: the baseline of Fig. 10.

    Args:
        train: Images to fit on, without batches of fewer images than components. Iterated twice.

    Raises:
        ValueError: No batch has as many images as components.
    """
    pca = IncrementalPCA(components)
    for images, _ in train:
        if len(images) >= components:
            pca.partial_fit(images.flatten(1).numpy())
    if not hasattr(pca, 'components_'):
        raise ValueError(f'There is no batch of {components} images to find {components} principal components in.')

    def reduce(batches: Iterable[Tuple[Tensor, Tensor]]) -> np.ndarray:
        return np.concatenate([pca.transform(images.flatten(1).numpy()) for images, _ in batches])

    return reduce(train), reduce(test)


def plot_cumulative_matches(curves: Mapping[str, np.ndarray], colors: Optional[Mapping[str, str]] = None) -> Figure:
    """Draw cumulative match over rank.

    Args:
        curves: Label -> percent for the ranks from 1 on, as from `cumulative_match`.
        colors: Label -> its colour.
    """
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    for label, curve in curves.items():
        ranks = range(1, len(curve) + 1)
        ax.plot(ranks, curve, marker='o', color=(colors or {}).get(label), label=literal(label, 60))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel('rank k')
    widen(ax, 1)
    ax.set_ylabel('the class is among the k nearest means, % of the images')
    ax.set_title('PCA + LDA and class means')
    ax.legend()
    return figure
