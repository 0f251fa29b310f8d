"""What the AWM models of all families share."""
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Union

from safetensors import SafetensorError
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, register_notrace_module, resolve_pretrained_cfg
from torch import Tensor, nn

from ..layers import ConcatMerge, SumMerge
from ._weights import add_merges, checkpoint_problem, fetch, only_safetensors

# CIFAR-10: mean and standard deviation of its training set; evaluated as it is, without a crop
CIFAR10_CFG: Dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    license='apache-2.0',
)

# timm's feature extractors leave them whole, so that optimizer and `record_mixing_weights` still find them
register_notrace_module(SumMerge)
register_notrace_module(ConcatMerge)


# An optimizer is handed parameters, never the model: this is how it can tell which of them are a classifier's.
_live: 'weakref.WeakSet[AwmModel]' = weakref.WeakSet()


class AwmModel(nn.Module):
    """Mixin for timm's model classes: clear errors for what does not fit an AWM network."""
    total_stride: int

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        enlist(self)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        enlist(self)  # copied or unpickled

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
            raise RuntimeError(checkpoint_problem(self, state_dict) or str(error)) from error

    def prune_intermediate_layers(self, indices: Union[int, List[int]] = 1, *args, **kwargs) -> List[int]:
        """As timm's, and the smallest image that `forward` takes follows."""
        taps = super().prune_intermediate_layers(indices, *args, **kwargs)  # type: ignore[misc]
        self.total_stride = self.feature_info[max(taps)]['reduction']
        return taps


def enlist(model: AwmModel) -> None:
    """Makes `classifier_parameters` know a model; called where one is made other than by its class."""
    _live.add(model)


def classifier_parameters() -> List[nn.Parameter]:
    """The parameters of the classifiers of all AWM models that are alive in this process."""
    return [p for model in list(_live) for p in model.get_classifier().parameters()]


def create_awm_model(
        awm_cls: Callable[..., nn.Module],
        plain_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool = False,
        awm: bool = True,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Mapping[str, Any]] = None,
        pretrained_filter_fn: Optional[Callable] = None,
        pretrained_strict: bool = True,
        cache_dir: Optional[Union[str, Path]] = None,
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
        pretrained_cfg, pretrained_cfg_overlay, pretrained_strict, cache_dir, **kwargs: As for
            `timm.models.build_model_with_cfg`.

    Raises:
        ValueError: `awm` is neither True nor False.
        FileNotFoundError: There are no safetensors where the weights should be.
        RuntimeError: The weights are damaged or do not fit.
    """
    if not isinstance(awm, bool):  # a text that looks like no would build the network with merges
        raise ValueError(f'awm is either True or False, got {awm!r}; on the command line: --model-kwargs awm=False')
    published = isinstance(pretrained_cfg, dict) and bool(pretrained_cfg.get('source'))
    if pretrained:
        pretrained_cfg_overlay = only_safetensors(pretrained_cfg, pretrained_cfg_overlay)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    fetched = fetch(cfg, cache_dir) if pretrained else None

    def checked(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
        return add_merges(state_dict, model, pretrained_filter_fn, published=published, strict=pretrained_strict)

    try:
        model = build_model_with_cfg(
            awm_cls if awm else plain_cls,
            variant,
            pretrained,
            pretrained_cfg={**cfg, 'file': fetched, 'source': None} if fetched else cfg,
            pretrained_filter_fn=checked,
            pretrained_strict=pretrained_strict,
            cache_dir=cache_dir,
            **kwargs,
        )
    except SafetensorError as error:
        raise RuntimeError(f'The weights are no whole safetensors file ({error}): get them again.') from error
    if fetched:  # it says where they are from, not where they are now
        del model.pretrained_cfg['file']
        model.pretrained_cfg.update({k: v for k, v in cfg.items() if k == 'source'})
    return model


def refuse_stem_arguments(kwargs: Mapping[str, Any], *names: str) -> None:
    """For the 32x32 networks, which have a stem and widths of their own.

    Raises:
        TypeError: One of the names is among the arguments.
    """
    for name in names:
        if name in kwargs:
            raise TypeError(f'{name} is not an argument of the 32x32 networks, whose stem and widths are given.')
