"""Numbers about mixing weights: how they vary, with the classes and without, and what can be told from them."""
from typing import Dict, Iterable, List, Mapping, NamedTuple, Tuple

import numpy as np
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor

__all__ = [
    'Profile', 'profile', 'class_means', 'between_class_share', 'rank_images', 'as_features', 'cumulative_match',
    'reduce_pixels']

COMPONENTS = 30  # the paper's ℝ^30
RANKS = 10


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
    if _constant(values):  # the rounding of a mean would have a variance
        return float('nan')
    _, counts, means = class_means(values, labels)
    mean = values.mean(0)
    return float((counts[:, None] * (means - mean) ** 2).sum() / ((values - mean) ** 2).sum())


def rank_images(lambdas: Mapping[str, Tensor]) -> Tuple[np.ndarray, np.ndarray]:
    """Images in ascending order of the sum of λ1, the weight of the convolutional branches, over all merges (Fig. 7).

    Args:
        lambdas: Name of the merge -> (images, 2), as from `observe`.

    Returns:
        The indices of the images in this order, and the sums in that of the images; (images,) both.

    Raises:
        ValueError: A merge weighs more than two paths, as in DenseNets: there is no convolutional branch.
    """
    if any(value.shape[1] != 2 for value in lambdas.values()):
        raise ValueError('Images are ranked by λ1 of residual blocks, but there is a merge of more than two paths.')
    sums = np.sum([value[:, 0].double().numpy() for value in lambdas.values()], axis=0)
    return np.argsort(sums, kind='stable'), sums


def as_features(lambdas: Mapping[str, Tensor]) -> np.ndarray:
    """All λ side by side, but the last of each merge, which follows from the others: in a ResNet, λ1 of every merge.

    Args:
        lambdas: Name of the merge -> (images, paths), as from `observe`.

    Returns:
        (images, sum of paths - 1), float64.
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
    """How well classes are told apart by PCA, LDA and the nearest class mean (section 4.4 and Fig. 10).

    The features are reduced by PCA to `components`, which LDA then turns into as many, or into one less than there are
    classes if that is less. (The paper says only that both together lead to 30 dimensions.) An image is compared with
    the mean of every class of the training images by Euclidean distance.

    Args:
        train, test: (images, features).
        train_labels, test_labels: (images,).
        components: Dimensions, less where there are fewer features, images or classes.
        ranks: The largest k, less where there are fewer classes.

    Returns:
        For k from 1 on, in percent, the test images whose class is among the k nearest; (ranks,).

    Raises:
        ValueError: There is one class only, no class has two images, all features are constant, or a class of the test
            images has no training image.
    """
    classes = np.unique(train_labels)
    if not 2 <= len(classes) < len(train):
        raise ValueError(f'LDA needs two classes or more, and more images than that: there are {len(classes)} classes '
                         f'in {len(train)} training images.')
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise ValueError(f'There are no training images of class {unknown[0]}: take more of them.')
    if _constant(train):
        raise ValueError('LDA has nothing to tell classes by: the features are the same for every training image.')
    pca = PCA(min(components, *train.shape), random_state=0).fit(train)
    # what is only rounding would be blown up by LDA, which scales to equal variance
    kept = int((pca.explained_variance_ > 1e-12 * np.square(train).mean()).sum())
    lda = LinearDiscriminantAnalysis(n_components=min(kept, len(classes) - 1))
    reduced = lda.fit_transform(pca.transform(train)[:, :kept], train_labels)
    _, _, means = class_means(reduced, train_labels)
    distances = euclidean_distances(lda.transform(pca.transform(test)[:, :kept]), means)
    own = np.take_along_axis(distances, np.searchsorted(classes, test_labels)[:, None], axis=1)
    nearer = (distances < own).sum(1)
    return np.array([100 * np.mean(nearer < k) for k in range(1, min(ranks, len(classes)) + 1)])


def reduce_pixels(
        train: Iterable[Tuple[Tensor, Tensor]],
        test: Iterable[Tuple[Tensor, Tensor]],
        components: int = COMPONENTS,
) -> Tuple[np.ndarray, np.ndarray]:
    """The first principal components of images, fitted on those for training: the baseline of Fig. 10, for
    `cumulative_match`. Incremental, so that one batch is in memory at a time.

    Args:
        train: Images, (batch, in_chans, height, width), and labels, which are not used; gone through twice. Batches of
            fewer images than components are left out of the fit.
        test: The same.
        components: Their number.

    Returns:
        Of train and of test, (images, components) each.

    Raises:
        ValueError: There is no batch of so many images.
    """
    pca = IncrementalPCA(components)
    fitted = False
    for images, _ in train:
        if len(images) >= components:
            pca.partial_fit(images.flatten(1).numpy())
            fitted = True
    if not fitted:
        raise ValueError(f'There is no batch of {components} images to find {components} principal components in.')

    def reduce(batches: Iterable[Tuple[Tensor, Tensor]]) -> np.ndarray:
        parts: List[np.ndarray] = [pca.transform(images.flatten(1).numpy()) for images, _ in batches]
        return np.concatenate(parts)

    return reduce(train), reduce(test)


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[:1]).all())
