"""A model as the Hub keeps it: a folder with config.json, model.safetensors and README.md, from which
`timm.create_model('local-dir:...')` and, once it is published, `timm.create_model('hf-hub:...')` build it again.
"""
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from safetensors.torch import load_file
from timm.models import DenseNet, ResNet, is_model, save_for_hf
from torch import nn

from ..layers import MixingWeights
from ..models.builder import AwmModel
from ..models.checkpoint import SAFETENSORS
from ..utils import new_folder
from .card import write_card

__all__ = ['load_folder', 'save_for_hub', 'write_model']

# of a `pretrained_cfg`, what is true of a model whatever its weights are; the rest is told about those of timm
KEPT = (
    'input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes',
    'pool_size', 'first_conv', 'classifier', 'custom_load')
# which argument of a model decides on which of its modules
ARGUMENTS: Tuple[Tuple[str, str], ...] = (
    (r'\.merge\b', 'awm_hidden'),
    (r'\.se\b', "block_args=dict(attn_layer=...)"),
    (r'\.aa\b|maxpool|pool0', 'aa_layer or replace_stem_pool'),
    (r'\bact\d?\b', 'act_layer'),
    (r'downsample', 'avg_down, down_kernel_size or output_stride'),
    (r'global_pool', 'global_pool'),
    (r'^(fc|classifier)', 'num_classes'),
    (r'\b(bn|norm)\d?\b', 'norm_layer'),
    (r'^(conv1|features\.conv\d)', 'in_chans, stem_type, stem_width or growth_rate'),
    (r'layer\d\.\d+\.conv\d', 'cardinality, base_width, block_reduce_first or output_stride'),
    (r'denselayer\d+\.conv\d', 'growth_rate or bn_size'),
    (r'^layer\d', 'layers'),
    (r'denseblock', 'block_config'),
)


def save_for_hub(
        model: nn.Module,
        folder: Union[str, Path],
        model_args: Optional[Mapping[str, Any]] = None,
        pretrained_cfg: Optional[Mapping[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
) -> None:
    """Writes a model, a converted one too, as a folder for the Hub: weights, configuration and a card.

    The model is built again from the folder and compared: keys, shapes, and outputs in eval mode.

    Args:
        model: An AWM model or a plain control that timm created or `timm_awm.convert` changed; it stays as it is.
        folder: New folder.
        model_args: The arguments that the model was created with, as far as timm does not keep them (before 1.0.31 it
            keeps none but the number of channels and classes and the pooling). Rates of dropout and drop path are for
            training only and need not be given.
        pretrained_cfg: What is true of these weights: tag, license, description, and the mean, std, input_size, ...
            that they were trained with, if they are not those of the model's own `pretrained_cfg`.
        label_names: Of the classes, in order.

    Raises:
        FileExistsError: The folder exists.
        ValueError: The configuration builds another model: names the argument that is missing.
    """
    with new_folder(Path(folder)) as partial:
        write_model(model, partial, model_args, pretrained_cfg, label_names)
        write_card(partial, model)


def write_model(
        model: nn.Module,
        folder: Path,
        model_args: Optional[Mapping[str, Any]] = None,
        pretrained_cfg: Optional[Mapping[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
) -> None:
    """As `save_for_hub`, without a card and into a folder that exists."""
    built = isinstance(model, (ResNet, DenseNet)) and getattr(model, 'pretrained_cfg', {}).get('architecture') or ''
    if not built.startswith('awm_'):
        raise ValueError(
            f'This {type(model).__name__} was not created under the name of an AWM model, by which it could be built '
            'again: use timm.create_model, or timm_awm.convert on a model of timm, and save it before it is wrapped or '
            "compiled. timm's own models are saved by timm.models.save_for_hf.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'There are {len(label_names)} label names for {model.num_classes} classes.')
    # a copy, for safetensors takes no channels-last tensors
    model = deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    args = {**_own_args(model), **(model_args or {})}
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k in KEPT}
    chans = args['in_chans']
    if len(cfg['mean']) != chans:
        cfg.update({name: [sum(cfg[name]) / len(cfg[name])] * chans for name in ('mean', 'std')})
    if chans not in (1, 3):
        cfg.pop('first_conv', None)  # before 1.0.31, timm would give the model a new one
    config['pretrained_cfg'] = {
        **cfg,
        'input_size': [chans, *cfg['input_size'][1:]],
        'description': f'{config["architecture"]}. Needs the package timm-awm: pip install timm-awm, import timm_awm.',
        'num_classes': model.num_classes,
        **(pretrained_cfg or {}),
    }
    if label_names is not None:
        config['label_names'] = list(label_names)
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
    _compare(model, folder)


def load_folder(folder: Union[str, Path]) -> nn.Module:
    """The model of a Hub folder, with exactly the weights in it.

    Raises:
        ValueError: What is in the folder is damaged, incomplete, or does not fit together; says what.
    """
    folder = Path(folder)
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        architecture = str(config['architecture'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is no configuration of a timm model ({type(error).__name__}: {error}).') from error
    if not (is_model(architecture) and architecture.startswith('awm_')):
        raise ValueError(
            f'{path} is of an architecture {architecture!r}, which is no AWM model that this timm_awm knows: a newer '
            'version may.')
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except (OSError, RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f'{folder} holds no whole {architecture}: {error}') from error
    weights, own = load_file(folder / SAFETENSORS), model.state_dict()
    other = sorted(k for k in own if k not in weights or not torch.equal(own[k], weights[k].to(own[k].dtype)))
    if other:
        raise ValueError(
            f'{path} builds a {architecture} that does not take all weights of {SAFETENSORS}: its '
            f'{", ".join(other[:3])} would be new. Its num_classes or model_args are wrong.')
    return model


def _own_args(model: nn.Module) -> Dict[str, Any]:
    """The arguments of a model that can be read from it."""
    args: Dict[str, Any] = dict(
        awm=isinstance(model, AwmModel),
        num_classes=model.num_classes,
        in_chans=next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels,
    )
    pool = getattr(getattr(model, 'global_pool', None), 'pool_type', None)
    if isinstance(pool, str) and pool:
        args['global_pool'] = pool
    hidden = {len(m.weight1) for m in model.modules() if isinstance(m, MixingWeights)}
    if hidden:
        args['awm_hidden'] = hidden.pop()
    if hasattr(model, 'awm_base'):
        args['base'] = model.awm_base
    return args


def _compare(model: nn.Module, folder: Path) -> None:
    """Builds a model again from its folder; raises ValueError if it is another one."""
    rebuilt = timm.create_model(f'local-dir:{folder}').eval()
    shapes, rebuilt_shapes = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, rebuilt))
    if shapes == rebuilt_shapes:
        rebuilt = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        images = torch.rand(2, *rebuilt.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            outputs, rebuilt_outputs = model.float()(images), rebuilt.float()(images)
        if torch.allclose(outputs, rebuilt_outputs, rtol=0, atol=0, equal_nan=True):
            return
    raise ValueError(_difference(model, rebuilt))


def _difference(model: nn.Module, rebuilt: nn.Module) -> str:
    """Where a model differs from the one that its configuration builds, and which argument may be missing."""
    ours, theirs = dict(model.named_modules()), dict(rebuilt.named_modules())
    for name in [*ours, *theirs]:
        one, other = _described(ours.get(name)), _described(theirs.get(name))
        if one != other and not re.search(r'drop_(path|block)', name):
            argument = next((arg for pattern, arg in ARGUMENTS if re.search(pattern, name)), 'some argument')
            return (
                f'The configuration does not build this model: {name or "the model itself"} is {one}, but {other} when '
                f'it is built again. Missing in model_args is probably {argument}.')
    return (
        'The model that is built again from the configuration has the same modules but other outputs: some argument '
        'that decides how they are used is missing in model_args.')


def _described(module: Optional[nn.Module]) -> str:
    return 'not there' if module is None else f'{type(module).__name__}({module.extra_repr()})'
