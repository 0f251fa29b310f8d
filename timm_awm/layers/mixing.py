"""λ from the descriptors of the paths: eq. 3 and 4 of the paper, in float32 (float64 for float64 maps)."""
import math
import weakref
from typing import Any, Dict, Iterable, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

_live: 'weakref.WeakSet[nn.Module]' = weakref.WeakSet()


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a map's sums and coefficients: float32, float64 for float64 maps."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channel_mean(x: Tensor) -> Tensor:
    """Global average of every channel of a path (eq. 3), its descriptor: (batch, channels), float32 or float64."""
    if has_torch_function((x,)):  # a proxy of torch.fx, which knows no dtype
        return handle_torch_function(channel_mean, (x,), x)
    return x.mean((2, 3), dtype=wide_dtype(x))


def descriptors(maps: List[Tensor]) -> Tensor:
    """The descriptors of all paths side by side, (batch, channels of all)."""
    return torch.cat([channel_mean(x) for x in maps], dim=1)


def mixing_logits(z: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    """The two FC layers, W2 · relu(W1 · Z): eq. 4 before its sigmoid, (batch, paths).

    Args:
        z: Descriptors of all paths side by side, (batch, features), float32 or float64.
        weight1: W1, (hidden, features).
        weight2: W2, (paths, hidden).
    """
    if torch.jit.is_scripting():
        # TorchScript can only switch autocast off for a device known when it compiles; float64 is what autocast skips
        hidden = F.relu(F.linear(z.double(), weight1.double()))
        return F.linear(hidden, weight2.double()).to(z.dtype)
    if has_torch_function((z,)):  # a proxy, which knows no device
        return handle_torch_function(mixing_logits, (z,), z, weight1, weight2)
    if not torch.jit.is_tracing() and z.shape[1] != weight1.shape[1]:
        raise ValueError(f'The paths have {z.shape[1]} channels together, but the merge was made for '
                         f'{weight1.shape[1]}: SumMerge takes the channels of one path, ConcatMerge those of each.')
    weight1, weight2 = weight1.to(z.dtype), weight2.to(z.dtype)
    if z.is_meta or not torch.is_autocast_enabled(z.device.type):  # autocast does not know the meta device
        return F.linear(F.relu(F.linear(z, weight1)), weight2)
    with torch.autocast(z.device.type, enabled=False):
        return F.linear(F.relu(F.linear(z, weight1)), weight2)


def scaled_mixing_weights(logits: Tensor) -> Tensor:
    """n · λ with λ = σ(l) / Σ σ(l): the sigmoid of eq. 4, normalised over the paths, times their number n.

    Computed as n · e / Σe, e = exp(logsigmoid(l) − max): the same numbers, finite when every sigmoid underflows, and
    exactly 1 for equal logits, where n · softmax would round for some n (41, 47, ...). Both are (batch, n).
    """
    # logsigmoid, which ONNX would compute as log(sigmoid(l)): -inf for large negative logits, NaN for λ
    log_sigma = -F.softplus(-logits, threshold=40)
    e = (log_sigma - log_sigma.detach().amax(1, keepdim=True)).exp()  # λ does not depend on what is subtracted
    return logits.shape[1] * e / e.sum(1, keepdim=True)


def weigh_sum(scales: Tensor, branch: Tensor, shortcut: Tensor) -> Tensor:
    """The weighed sum; scales are n · λ, (batch, 2)."""
    # a · F + b · x and no lerp: the plain sum, bit for bit, at λ = ½. mul, as `*` of torch.fx's
    # optimize_for_inference cannot broadcast
    a, b = scales.view(-1, 2, 1, 1, 1).unbind(1)
    return (branch.mul(a) + shortcut.mul(b)).to(branch.dtype)


def weigh_concat(scales: Tensor, maps: List[Tensor]) -> Tensor:
    """The concatenation of weighed maps; scales are n · λ, (batch, paths)."""
    weights = scales[:, :, None, None, None]
    return torch.cat([x.mul(weights[:, i]).to(x.dtype) for i, x in enumerate(maps)], dim=1)


def is_mkldnn(x: Tensor) -> bool:
    """Whether this is a map of `torch.utils.mkldnn.to_mkldnn`, whose layout has neither means nor broadcasting."""
    return type(x) is Tensor and x.layout == torch._mkldnn  # type: ignore[attr-defined]


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
        # no nn.Linear: tools that replace or hook every Linear would meet layers whose forward is never called
        self.weight1 = nn.Parameter(torch.empty(hidden_features, num_features, device=device, dtype=dtype))
        self.weight2 = nn.Parameter(torch.empty(num_paths, hidden_features, device=device, dtype=dtype))
        self.reset_parameters()
        _live.add(self)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight1, a=math.sqrt(5))
        nn.init.zeros_(self.weight2)

    def extra_repr(self) -> str:
        hidden, features = self.weight1.shape
        return f'num_features={features}, num_paths={self.num_paths}, hidden_features={hidden}'

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _live.add(self)  # copied or unpickled

    def forward(self, z: Tensor) -> Tensor:
        """n · λ, (batch, num_paths), from descriptors side by side, (batch, num_features), float32 or float64."""
        return scaled_mixing_weights(mixing_logits(z, self.weight1, self.weight2))


def count_parameters(model: nn.Module) -> Tuple[int, int, int]:
    """The number of parameters of a model, of those in its merges, and of its merges."""
    merges = [m for m in model.modules() if isinstance(m, MixingWeights)]
    in_merges = sum(p.numel() for m in merges for p in m.parameters())
    return sum(p.numel() for p in model.parameters()), in_merges, len(merges)


def merge_parameters() -> List[nn.Parameter]:
    """The parameters of all merges that are alive in this process: optimizers, which get no model, ask for them."""
    return [p for mix in list(_live) for p in mix.parameters()]


def renew_compiled_guards(params: Iterable[Tensor]) -> None:
    """Makes compiled networks with merges of these parameters look again at which require gradients: torch.compile
    trusts a module whose dict of parameters is the same. In 2.9 it does not see `requires_grad_`, in 2.14 it does."""
    own = {id(p) for p in params}
    for mix in list(_live):
        if any(id(p) in own for p in mix.parameters()):
            mix._parameters = dict(mix._parameters)
