"""What the AWM models of all families share."""
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Type, Union

from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, register_notrace_module
from torch import Tensor, nn

from ..layers import ConcatMerge, SumMerge

# CIFAR-10: mean and standard deviation of its training set; evaluated as it is, without a crop
CIFAR10_CFG: Dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

# timm's feature extractors leave them whole, so that optimizer and `record_mixing_weights` still find them
register_notrace_module(SumMerge)
register_notrace_module(ConcatMerge)


class AwmModel(nn.Module):
    """Mixin for timm's model classes: clear errors for what does not fit an AWM network."""
    total_stride: int

    # timm's, with the check: TorchScript knows no super()
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
        _assert(x.shape[-2] >= stride, f'Input height must be at least {stride}, the stride of the network.')
        _assert(x.shape[-1] >= stride, f'Input width must be at least {stride}, the stride of the network.')
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`.

        Raises:
            RuntimeError: The checkpoint does not fit; says what it is and what to do.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise RuntimeError(_checkpoint_problem(self, state_dict) or str(error)) from error

    def prune_intermediate_layers(self, indices: Union[int, List[int]] = 1, *args, **kwargs) -> List[int]:
        """As timm's, and the smallest image that `forward` takes follows."""
        taps = super().prune_intermediate_layers(indices, *args, **kwargs)  # type: ignore[misc]
        self.total_stride = self.feature_info[max(taps)]['reduction']
        return taps


def create_awm_model(
        awm_cls: Type[nn.Module],
        plain_cls: Type[nn.Module],
        variant: str,
        pretrained: bool = False,
        awm: bool = True,
        pretrained_filter_fn: Optional[Callable] = None,
        **kwargs,
) -> nn.Module:
    """Builds an AWM model or its plain control.

    Args:
        awm_cls: The class with merges.
        plain_cls: Its plain control.
        variant: Name of the model.
        pretrained: Load pretrained weights.
        awm: False builds the plain control.
        pretrained_filter_fn: timm's own for checkpoints of the plain network.
        **kwargs: As for `timm.models.build_model_with_cfg`.

    Raises:
        ValueError: `awm` is neither True nor False.
    """
    if not isinstance(awm, bool):  # a text that looks like no would build the network with merges
        raise ValueError(f'awm is either True or False, got {awm!r}; on the command line: --model-kwargs awm=False')

    def with_merges(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
        return add_merges(pretrained_filter_fn(state_dict) if pretrained_filter_fn else state_dict, model)

    return build_model_with_cfg(
        awm_cls if awm else plain_cls,
        variant,
        pretrained,
        pretrained_filter_fn=with_merges if awm else pretrained_filter_fn,
        **kwargs,
    )


def refuse_stem_arguments(kwargs: Mapping[str, Any], *names: str) -> None:
    """For the 32x32 networks, which have a stem and widths of their own.

    Raises:
        TypeError: One of the names is among the arguments.
    """
    for name in names:
        if name in kwargs:
            raise TypeError(f'{name} is not an argument of the 32x32 networks, whose stem and widths are given.')


def add_merges(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Lets a plain checkpoint start an AWM model at the identity, and refuses one that has lost some of its merges."""
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
    """Why a checkpoint does not fit the model and what to do about it; empty if its keys and shapes do fit."""
    if 'state_dict' in state_dict or any(k.startswith(('module.', '_orig_mod.')) for k in state_dict):
        return 'This is a checkpoint of a training run: load it with timm.models.load_checkpoint(model, path).'
    own = model.state_dict()
    # torch itself makes up for counters that old checkpoints lack
    missing = {k for k in own.keys() - state_dict.keys() if not k.endswith('num_batches_tracked')}
    unknown = state_dict.keys() - own.keys()
    misshapen = {
        k for k in own.keys() & state_dict.keys() if getattr(state_dict[k], 'shape', None) != own[k].shape}
    if not (missing or unknown or misshapen):
        return ''
    merges = {k for k in own if _is_merge_key(k)}
    if missing == merges and not (unknown or misshapen):
        return (
            'This is a checkpoint of the plain network, it has no merge weights. To start AWM from it, with every '
            'merge at the identity, use create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)) or '
            '`train.py --pretrained --pretrained-path ...`, which also starts a new classifier; for the plain network '
            'add awm=False.')
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
