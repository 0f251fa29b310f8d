"""Classes told apart by the mixing weights alone (section 4.4 and Fig. 10)."""
from typing import Mapping, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor

from .figures import literal, widen
from .observed import Batches

COMPONENTS = 30  # the paper's number
RANKS = 10


def as_features(lambdas: Mapping[str, Tensor]) -> np.ndarray:
    """All λ side by side, (images, features), without the last of each merge, which follows from the others."""
    return np.concatenate([value[:, :-1].double().numpy() for value in lambdas.values()], axis=1)


def cumulative_match(
        train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """Percentage of images whose class is among the k nearest class means, after PCA and LDA.

    PCA reduces the features to 30; LDA turns these into as many, or one less than there are classes if that is less.
    (The paper says only that both together lead to 30 dimensions.) Distances are Euclidean.

    Args:
        train, test: (images, features).
        train_labels, test_labels: (images,).

    Returns:
        Percent of the test images for k from 1 to 10, or to the number of classes.

    Raises:
        ValueError: A class of the test images has no training image; or of scikit-learn, where there is one class
            only, no class has two images, or all features are constant.
    """
    classes = np.unique(train_labels)
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise ValueError(f'There are no training images of class {unknown[0]}: take more of them.')
    pca = PCA(min(COMPONENTS, *train.shape), random_state=0).fit(train)
    # LDA scales to equal variance, rounding errors too
    kept = int((pca.explained_variance_ > 1e-12 * np.square(train).mean()).sum())
    lda = LinearDiscriminantAnalysis().fit(pca.transform(train)[:, :kept], train_labels)
    distances = euclidean_distances(lda.transform(pca.transform(test)[:, :kept]), lda.transform(lda.means_))
    own = np.take_along_axis(distances, np.searchsorted(classes, test_labels)[:, None], axis=1)
    nearer = (distances < own).sum(1)
    return np.array([100 * np.mean(nearer < k) for k in range(1, min(RANKS, len(classes)) + 1)])


def reduce_pixels(train: Batches, test: Batches, components: int = COMPONENTS) -> Tuple[np.ndarray, np.ndarray]:
    """Principal components of the images of train and of test, (images, components) each: the baseline of Fig. 10.

    Args:
        train: Images to fit on, without batches of fewer images than components. Iterated twice.
    """
    pca = IncrementalPCA(components)
    for images, _ in train:
        if len(images) >= components:
            pca.partial_fit(images.flatten(1).numpy())
    reduced = [[pca.transform(images.flatten(1).numpy()) for images, _ in batches] for batches in (train, test)]
    return np.concatenate(reduced[0]), np.concatenate(reduced[1])


def plot_cumulative_matches(curves: Mapping[str, np.ndarray]) -> Figure:
    """Draw results of `cumulative_match`, by their labels, over the rank."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    for label, curve in curves.items():
        ax.plot(range(1, len(curve) + 1), curve, marker='o', label=literal(label))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel('rank k')
    widen(ax, 1)
    ax.set_ylabel('the class is among the k nearest means, % of the images')
    ax.set_title('PCA + LDA and class means')
    ax.legend()
    return figure
