"""What the AWM models of all families share."""
from typing import Any, Dict, Iterable, Mapping

from timm.layers.trace_utils import _assert
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..layers import ConcatMerge, SumMerge, descriptor

# CIFAR-10: mean and standard deviation of its training set; evaluated as it is, without a crop
CIFAR10_CFG: Dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

# torch.fx cannot follow the dtype and the device of a proxy
register_notrace_module(SumMerge)
register_notrace_module(ConcatMerge)
register_notrace_function(descriptor)


class AwmModel(nn.Module):
    """Mixin for timm's model classes: clear errors for what does not fit an AWM network."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: Images, (batch, in_chans, height, width).

        Returns:
            Logits, (batch, num_classes).

        Raises:
            AssertionError: The images are smaller than the network's stride.
        """
        stride: int = self.total_stride
        _assert(x.shape[2] >= stride, f'Input height must be at least {stride}, the stride of the network.')
        _assert(x.shape[3] >= stride, f'Input width must be at least {stride}, the stride of the network.')
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`, but a checkpoint that does not fit changes nothing.

        Raises:
            RuntimeError: The checkpoint does not fit; says what it is and what to do.
        """
        problem = _checkpoint_problem(self, state_dict) if strict else ''
        if problem:
            raise RuntimeError(problem)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Lets a plain checkpoint start an AWM model at the identity, and refuses one that has lost some of its merges.

    timm applies it for `pretrained=True` and `--pretrained-path`.
    """
    merges = {k: v for k, v in model.state_dict().items() if _is_merge_key(k)}
    missing = merges.keys() - state_dict.keys()
    if len(missing) == len(merges):
        return {**state_dict, **merges}  # those of the new model: W2 is zero
    if missing:
        raise RuntimeError(_incomplete(missing, merges))
    return state_dict


def _is_merge_key(key: str) -> bool:
    return '.merge.' in key


def _checkpoint_problem(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Why a checkpoint does not fit the model and what to do about it; empty if it fits."""
    own = model.state_dict()
    # torch itself makes up for counters that old checkpoints lack
    missing = {k for k in own.keys() - state_dict.keys() if not k.endswith('num_batches_tracked')}
    unknown = state_dict.keys() - own.keys()
    misshapen = {k for k in own.keys() & state_dict.keys() if own[k].shape != state_dict[k].shape}
    if not (missing or unknown or misshapen):
        return ''
    merges = {k for k in own if _is_merge_key(k)}
    if missing == merges and not (unknown or misshapen):
        return (
            'This is a checkpoint of the plain network, it has no merge weights. To start AWM from it, with every '
            'merge at the identity, use create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)) or '
            '`train.py --pretrained --pretrained-path ...`; for the plain network add awm=False.')
    if missing < merges and not (unknown or misshapen):
        return _incomplete(missing, merges)
    return (
        f'The checkpoint does not fit this {type(model).__name__}, of {len(own)} tensors '
        f'{len(missing)} are missing ({_some(missing)}), {len(misshapen)} have another shape ({_some(misshapen)}), '
        f'and {len(unknown)} are unknown ({_some(unknown)}). It belongs to another architecture or to other model '
        'arguments: create the model that it was saved from.')


def _incomplete(missing: Iterable[str], merges: Iterable[str]) -> str:
    missing, merges = list(missing), list(merges)
    return (
        f'The checkpoint lacks {len(missing)} of the {len(merges)} merge weights ({_some(missing)}): it is damaged or '
        'was saved from another AWM model. Use the complete checkpoint.')


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ', '.join(keys[:2] + ['...'] * (len(keys) > 2)) or 'none'
