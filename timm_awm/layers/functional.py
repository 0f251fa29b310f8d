"""The pure functions of a merge: equations 2 to 4 of "Residual Convolutional Neural Network Revisited with Active
Weighted Mapping" (Jung et al., 2018), and their form for a concatenation (the paper's Fig. 8).

λ and the weighing are computed in float32 (float64 for float64 maps) whatever the autocast, and the merged map is
rounded once, to the dtype of its paths.
"""
from contextlib import nullcontext
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['descriptor', 'mixing_logits', 'scaled_mixing_weights', 'weighted_sum', 'weighted_concat']


def descriptor(x: Tensor) -> Tensor:
    """Global average of every channel (eq. 3).

    Args:
        x: A path, (batch, channels, height, width).

    Returns:
        (batch, channels), float32 or float64.
    """
    return x.mean((2, 3), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def mixing_logits(z: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    """The two FC layers, W2 · relu(W1 · Z): eq. 4 before its sigmoid.

    Args:
        z: Descriptors of all paths side by side, (batch, features), float32 or float64.
        weight1: W1, (hidden, features).
        weight2: W2, (paths, hidden).

    Returns:
        (batch, paths), in the dtype of z.
    """
    if torch.jit.is_scripting():
        # TorchScript can only switch autocast off for a device known when it compiles; float64 is what autocast skips
        hidden = F.relu(F.linear(z.double(), weight1.double()))
        return F.linear(hidden, weight2.double()).to(z.dtype)
    # autocast does not know the meta device
    with nullcontext() if z.is_meta else torch.autocast(z.device.type, enabled=False):
        return F.linear(F.relu(F.linear(z, weight1.to(z.dtype))), weight2.to(z.dtype))


def scaled_mixing_weights(logits: Tensor) -> Tensor:
    """n · λ with λ = σ(l) / Σ σ(l): the sigmoid of eq. 4, normalised over the paths, times their number n.

    Computed as n · e / Σe, e = exp(logsigmoid(l) − max): the same numbers, finite when every sigmoid underflows, and
    exactly 1 for equal logits, where n · softmax would round for some n (41, 47, ...).

    Args:
        logits: (batch, n).

    Returns:
        (batch, n), every row sums to n.
    """
    # logsigmoid, which ONNX would compute as log(sigmoid(l)): -inf for large negative logits, NaN for λ
    log_sigma = -F.softplus(-logits, threshold=40)
    e = (log_sigma - log_sigma.detach().amax(1, keepdim=True)).exp()  # λ does not depend on what is subtracted
    return logits.shape[1] * e / e.sum(1, keepdim=True)


def weighted_sum(branch: Tensor, shortcut: Tensor, scales: Tensor) -> Tensor:
    """2λ1 · F(x) + 2λ2 · x (eq. 2, times the number of paths): the plain sum, bit for bit, at λ = ½.

    Args:
        branch: F(x), (batch, channels, height, width).
        shortcut: x, of the same shape.
        scales: n · λ, (batch, 2).

    Returns:
        The merged map, in shape and dtype like branch.
    """
    a, b = scales.view(-1, 2, 1, 1, 1).unbind(1)
    return (a * branch + b * shortcut).to(branch.dtype)


def weighted_concat(maps: List[Tensor], scales: Tensor) -> Tensor:
    """[n · λi · map_i] along the channels (Fig. 8): the plain concatenation, bit for bit, at λ = 1/n.

    Args:
        maps: n maps of equal batch, height and width.
        scales: n · λ, (batch, n).

    Returns:
        (batch, sum of channels, height, width).

    Raises:
        ValueError: The number of maps is not that of the weights.
    """
    if len(maps) != scales.shape[1]:
        raise ValueError(f'Got {len(maps)} maps for {scales.shape[1]} mixing weights: a merge takes one map per path.')
    weights = scales.view(-1, len(maps), 1, 1, 1).unbind(1)
    return torch.cat([(w * x).to(x.dtype) for w, x in zip(weights, maps)], dim=1)
