"""The merge: what stands where a network has a plain sum or a plain concatenation.

Paper: "Residual Convolutional Neural Network Revisited with Active Weighted Mapping" (Jung et al., 2018), section 3.1
for sums, section 4.3 and Fig. 8 for concatenations.

λ and the weighing are computed in float32 (float64 for float64 maps) whatever the autocast, and the merged map is
rounded once, to the dtype of its paths.
"""
import math
import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from . import kernels
from .fused import affine_act, batch_norm_affine, can_fuse, moments, uses_batch_statistics

__all__ = [
    'MixingWeights', 'SumMerge', 'ConcatMerge', 'fused_sum', 'fused_concat', 'count_parameters', 'merge_parameters',
    'renew_compiled_guards']

# An optimizer is handed parameters, never the model: this is how it can tell which of them belong to a merge.
_live: 'weakref.WeakSet[MixingWeights]' = weakref.WeakSet()


def channel_mean(x: Tensor) -> Tensor:
    """Global average of every channel (eq. 3): the descriptor of a path.

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
    weight1, weight2 = weight1.to(z.dtype), weight2.to(z.dtype)
    if z.is_meta or not torch.is_autocast_enabled(z.device.type):  # autocast does not know the meta device
        return F.linear(F.relu(F.linear(z, weight1)), weight2)
    with torch.autocast(z.device.type, enabled=False):
        return F.linear(F.relu(F.linear(z, weight1)), weight2)


# torch.fx cannot follow the dtype and the device of a proxy
torch.fx.wrap('channel_mean')
torch.fx.wrap('mixing_logits')


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


class MixingWeights(nn.Module):
    """Infers the mixing weights λ of n paths from their descriptors (eq. 4 and the normalisation after it).

    Two FC layers without bias: W1, (hidden_features, num_features), and W2, (num_paths, hidden_features).
    W1 starts as in `torch.nn.Linear`, W2 at zero, so that every λ starts at exactly 1/n: the paper's "we set the weight
    values to 0.5", and what the authors' code does (docs/method.md).

    Args:
        num_features: Channels of all paths together (2C for a sum).
        num_paths: Number of paths n.
        hidden_features: Width e of the hidden layer.
    """

    def __init__(
            self, num_features: int, num_paths: int, hidden_features: int, device: Any = None, dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_paths < 2:
            raise ValueError(f'A merge weighs at least two paths, got {num_paths}.')
        if not isinstance(hidden_features, int) or hidden_features < 1:
            raise ValueError(f'The hidden layer of a merge needs a positive whole width, got {hidden_features!r}.')
        self.num_paths = num_paths
        # no nn.Linear: whatever swaps or hooks those would miss that both are applied in float32
        self.weight1 = nn.Parameter(torch.empty(hidden_features, num_features, device=device, dtype=dtype))
        self.weight2 = nn.Parameter(torch.empty(num_paths, hidden_features, device=device, dtype=dtype))
        self.reset_parameters()
        _live.add(self)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight1, a=math.sqrt(5))
        nn.init.zeros_(self.weight2)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _live.add(self)  # copied or unpickled

    def forward(self, z: Tensor) -> Tensor:
        """
        Args:
            z: Descriptors side by side, (batch, num_features), float32 or float64.

        Returns:
            n · λ, (batch, num_paths).
        """
        return scaled_mixing_weights(mixing_logits(z, self.weight1, self.weight2))


class SumMerge(nn.Module):
    """Replaces F(x) + x by 2 · (λ1 · F(x) + λ2 · x), λ inferred from both paths (eq. 2).

    Args:
        channels: Channels C of either path.
        hidden_features: Width e of the hidden layer, 16 in the paper's ResNets.
    """

    def __init__(self, channels: int, hidden_features: int = 16, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.mix = MixingWeights(2 * channels, 2, hidden_features, device=device, dtype=dtype)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """
        Args:
            branch: F(x), (batch, channels, height, width).
            shortcut: x, of the same shape.

        Returns:
            The merged map, of the same shape, in the dtype of branch.
        """
        if not torch.jit.is_scripting():
            fused = fused_sum(self, branch, shortcut)
            if fused is not None:
                return fused
        scales = self.mix(torch.cat([channel_mean(branch), channel_mean(shortcut)], dim=1))
        # a · F + b · x and no lerp: the plain sum, bit for bit, at λ = ½
        a, b = scales.view(-1, 2, 1, 1, 1).unbind(1)
        return (a * branch + b * shortcut).to(branch.dtype)


class ConcatMerge(nn.Module):
    """Replaces torch.cat(maps, 1) by the concatenation of n · λi · map_i, λ inferred from all maps (Fig. 8).

    Args:
        channels: Channels of each map, in order.
        hidden_features: Width e of the hidden layer, 24 in the authors' DenseNets (docs/method.md).
    """

    def __init__(
            self, channels: Sequence[int], hidden_features: int = 24, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.mix = MixingWeights(sum(channels), len(channels), hidden_features, device=device, dtype=dtype)
        self.num_paths = len(channels)

    def forward(self, maps: List[Tensor]) -> Tensor:
        """
        Args:
            maps: As many as there are channels entries, (batch, channels[i], height, width).

        Returns:
            (batch, sum(channels), height, width).

        Raises:
            ValueError: The number of maps is not that of the weights.
        """
        if len(maps) != self.num_paths:
            raise ValueError(f'Got {len(maps)} maps for a merge of {self.num_paths} paths.')
        if not torch.jit.is_scripting():
            fused = fused_concat(self, maps)
            if fused is not None:
                return fused
        scales = self.mix(torch.cat([channel_mean(x) for x in maps], dim=1))
        weights = scales[:, :, None, None, None]
        return torch.cat([(weights[:, i] * x).to(x.dtype) for i, x in enumerate(maps)], dim=1)


def fused_sum(
        merge: nn.Module,
        branch: Tensor,
        shortcut: Tensor,
        norm: Optional[nn.Module] = None,
        act: Optional[nn.Module] = None,
) -> Optional[Tensor]:
    """act(merge(norm(branch), shortcut)), fused.

    Args:
        merge: A `SumMerge`.
        branch: (batch, channels, height, width).
        shortcut: Of the same shape.
        norm: BatchNorm2d, none if None.
        act: ReLU, none if None.

    Returns:
        The merged map; or None, with nothing done, where it cannot be fused.
    """
    skipped = ((merge, SumMerge), (norm, nn.BatchNorm2d), (act, nn.ReLU))
    if not can_fuse((branch, shortcut), skipped) or branch.shape != shortcut.shape:
        return None
    u, mean, var = moments(branch, uses_batch_statistics(norm))
    v, shortcut_mean, _ = moments(shortcut, False)
    if norm is None:
        k, s = torch.ones_like(mean[0]), torch.zeros_like(mean[0])
    else:
        k, s = batch_norm_affine(norm, mean, var, u.shape[2] * u.shape[3])
    scales = merge.mix(torch.cat([torch.addcmul(s, mean, k), shortcut_mean], dim=1))
    weight, shortcut_weight = scales.split(1, dim=1)
    return affine_act(u, v, weight * k, shortcut_weight.expand_as(mean), weight * s, act is not None)


def fused_concat(merge: nn.Module, maps: List[Tensor], norm: Optional[nn.Module] = None) -> Optional[Tensor]:
    """norm(merge(maps)), fused.

    Args:
        merge: A `ConcatMerge`.
        maps: As many as the merge has paths, (batch, channels[i], height, width).
        norm: timm's BatchNormAct2d with a ReLU, none if None.

    Returns:
        (batch, sum(channels), height, width); or None, with nothing done, where it cannot be fused.
    """
    skipped = [(merge, ConcatMerge), (norm, BatchNormAct2d)]
    if norm is not None:
        skipped += [(getattr(norm, 'act', None), nn.ReLU), (getattr(norm, 'drop', None), nn.Identity)]
    if not can_fuse(maps, skipped):
        return None
    x, mean, var = moments(torch.cat(maps, dim=1), uses_batch_statistics(norm))
    # n · λ for each channel; no repeat_interleave, which would need the numbers of channels on the device
    weights = merge.mix(mean).split(1, dim=1)
    a = torch.cat([w.expand(-1, x.shape[1]) for w, x in zip(weights, maps)], dim=1)
    c = torch.zeros_like(a)
    if norm is not None:
        k, s = batch_norm_affine(norm, a * mean, None if var is None else a.square() * var, x.shape[2] * x.shape[3])
        a, c = a * k, s.expand_as(a)
    if torch.is_grad_enabled():
        return affine_act(x, None, a, None, c, norm is not None)
    kernels.affine_act_(x, a, c, norm is not None)  # x is new
    return x


def merge_parameters() -> List[nn.Parameter]:
    """The parameters of all merges that are alive in this process."""
    return [p for mix in list(_live) for p in mix.parameters()]


def renew_compiled_guards() -> None:
    """Makes compiled networks with merges look again at which parameters require gradients.

    torch.compile trusts a module whose dict of parameters is the same. In torch 2.9 it does not see `requires_grad_`,
    and would go on with the graph of the other phase; in 2.14 it does.
    """
    for mix in list(_live):
        mix._parameters = dict(mix._parameters)


def count_parameters(model: nn.Module) -> Tuple[int, int, int]:
    """The number of parameters of a model, of those in its merges, and of its merges."""
    merges = [m for m in model.modules() if isinstance(m, MixingWeights)]
    in_merges = sum(p.numel() for m in merges for p in m.parameters())
    return sum(p.numel() for p in model.parameters()), in_merges, len(merges)
