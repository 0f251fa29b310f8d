"""Merges for plain networks, and the creation of models: shared by all families."""
from typing import Any, Callable, Dict, Mapping, Optional, Type

import torch
from safetensors import SafetensorError
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
    register_notrace_module,
)
from timm.models.densenet import DenseLayer
from torch import nn

from ..layers import ConcatMerge, SumMerge
from .checkpoint import SAFETENSORS, checkpoint_filter, checkpoint_problem, identity_cfg

# timm's plain classes -> ours with merges. Each family adds its own.
AWM_BLOCKS: Dict[Type[nn.Module], Type[nn.Module]] = {}
AWM_CLASSES: Dict[Type[nn.Module], Type[nn.Module]] = {}

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


class AwmModel(nn.Module):
    """Mixin that makes one of timm's model classes a class with merges.

    Args:
        awm_hidden: As for `add_merges`.
        **kwargs: As for timm's class.
    """

    def __init__(self, *args: Any, awm_hidden: Optional[int] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_merges(self, awm_hidden)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads as `torch.nn.Module` does; its RuntimeError says what the checkpoint is and what to do."""
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise RuntimeError(checkpoint_problem(self, state_dict) or str(error)) from error


def add_merges(model: nn.Module, awm_hidden: Optional[int] = None) -> nn.Module:
    """Gives a plain network merges, in place, and returns it.

    Blocks change class and keep all else: parameters and their names, hooks, mode. Merges leave the random numbers as
    they were, so that with the same seed the plain network gets the same weights, order of data and augmentations.

    Args:
        model: Plain model, its class in AWM_CLASSES and its blocks in AWM_BLOCKS.
        awm_hidden: Width e of the merges' hidden layers; that of the paper and its authors if not given.

    Raises:
        TypeError: It is of another class, or of other blocks.
    """
    model_class = type(model) if isinstance(model, AwmModel) else AWM_CLASSES.get(type(model))
    known = (*AWM_BLOCKS, DenseLayer)
    blocks = {type(module) for module in model.modules() if isinstance(module, known)}
    if model_class is None or not blocks or not blocks.issubset(known):
        raise TypeError(
            f"This {type(model).__name__} of {', '.join(sorted(block.__name__ for block in blocks)) or 'other blocks'} "
            "gets no merges: timm_awm takes timm's ResNets and DenseNets of timm's own blocks, without merges yet; the "
            'network itself, before it is wrapped, compiled or scripted.')
    hidden = {} if awm_hidden is None else dict(hidden_features=awm_hidden)
    with torch.random.fork_rng(devices=[]):  # the order of the data is that of the plain network's run, too
        for block in list(model.modules()):
            if type(block) in AWM_BLOCKS:
                awm_class: Any = AWM_BLOCKS[type(block)]
                merges = awm_class.make_merges(block, **hidden)  # before anything is changed
                block.__class__ = awm_class
                for owner, merge in merges:
                    owner.add_module('merge', merge.train(block.training))
    model.__class__ = model_class
    return model


def create_awm_model(
        variant: str,
        plain: Callable[..., nn.Module],
        pretrained: bool = False,
        awm: bool = True,
        awm_hidden: Optional[int] = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Mapping[str, Any]] = None,
        feature_cfg: Optional[Mapping[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Builds an AWM model or its plain control, by `timm.models.build_model_with_cfg`.

    Args:
        variant: Name of the AWM model.
        plain: Builds the plain network.
        awm: False builds the plain control.
        awm_hidden: As for `add_merges`.

    Raises:
        RuntimeError: The weights are damaged or do not fit.
    """
    if not isinstance(awm, bool):  # a text that looks like no would build the network with merges
        raise ValueError(f'awm is either True or False, got {awm!r}; on the command line: --model-kwargs awm=False')
    overlay = dict(pretrained_cfg_overlay or {})
    if isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') == 'hf-hub':
        overlay.setdefault('hf_hub_filename', SAFETENSORS)  # else timm takes pickled weights where it finds no others
    try:
        return build_model_with_cfg(
            (lambda **plain_kwargs: add_merges(plain(**plain_kwargs), awm_hidden)) if awm else plain,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoint_filter,
            feature_cfg=dict(feature_cfg or {}),  # timm changes it
            **kwargs,
        )
    except SafetensorError as error:
        raise RuntimeError(f'The weights are no whole safetensors file ({error}): get them again.') from error


def register_awm_model(
        module: Dict[str, Any],
        name: str,
        plain: Optional[Callable[..., nn.Module]] = None,
        cfg: Optional[Dict[str, Any]] = None,
        **defaults: Any,
) -> None:
    """Registers an entry point with timm, and puts it into its module.

    Args:
        module: globals() of the file, whose `default_cfgs` gets the model's.
        name: Name of the AWM model.
        plain: Builds the plain network; None: timm's of the same name, whose checkpoints, with the merges at the
            identity, are its starts: `resnet50.a1_in1k` becomes `awm_resnet50.a1_in1k_identity`.
        cfg: The pretrained_cfg of a model without weights.
        **defaults: Arguments of `create_awm_model` that callers may override.
    """
    base = name.removeprefix('awm_')
    build = plain or model_entrypoint(base)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_awm_model(name, build, pretrained, **dict(defaults, **kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module['__name__']
    entrypoint.__doc__ = f'{base} with AWM merges.'
    cfgs: Dict[str, Any] = {f'{name}.untrained': cfg} if cfg else {
        f'awm_{key}_identity': identity_cfg(own, name)
        for key, own in get_arch_pretrained_cfgs(base).items() if own.hf_hub_id}
    module['default_cfgs'].update(generate_default_cfgs(cfgs))
    module[name] = register_model(entrypoint)
