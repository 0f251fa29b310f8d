"""A model as the Hub keeps it: a folder with config.json, model.safetensors and README.md, from which
`timm.create_model('local-dir:...')` and, once it is published, `timm.create_model('hf-hub:...')` build it again.
"""
import json
from copy import deepcopy
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import timm
import torch
from safetensors.torch import load_file
from timm.models import DenseNet, ResNet, is_model, save_for_hf
from torch import nn

from ..models.checkpoint import SAFETENSORS
from ..utils import new_folder
from .card import write_card

__all__ = ['load_folder', 'save_for_hub', 'write_model']

# of a `pretrained_cfg`, what is true of a model whatever its weights are; the rest is told about those of timm
KEPT = (
    'input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes',
    'pool_size', 'first_conv', 'classifier', 'custom_load')


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
        model_args: Arguments that build the model again, beside those that it was created with, which timm records.
        pretrained_cfg: What is true of these weights: tag, license, description, and the mean, std, input_size, ...
            that they were trained with, if they are not those of the model's own `pretrained_cfg`.
        label_names: Of the classes, in order.

    Raises:
        FileExistsError: The folder exists.
        ValueError: The configuration builds another model.
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
    save_for_hf(model, str(folder), model_args=dict(model_args or {}), safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # at the top already; transformers refuses it twice
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k in KEPT}
    chans = cfg['input_size'][0]
    if len(cfg['mean']) != chans:
        cfg.update({name: [sum(cfg[name]) / len(cfg[name])] * chans for name in ('mean', 'std')})
    config['pretrained_cfg'] = {
        **cfg,
        'description': f'{config["architecture"]}. Needs the package timm-awm: pip install timm-awm, import timm_awm.',
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


def _compare(model: nn.Module, folder: Path) -> None:
    """Builds a model again from its folder; raises ValueError if it is another one."""
    rebuilt = timm.create_model(f'local-dir:{folder}').eval()
    ours, theirs = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, rebuilt))
    if ours == theirs:
        rebuilt = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        images = torch.rand(2, *rebuilt.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            if torch.allclose(model.float()(images), rebuilt.float()(images), rtol=0, atol=0, equal_nan=True):
                return
    different = sorted(dict(ours.items() ^ theirs.items()))
    raise ValueError(
        'The configuration builds another model than this one'
        + (f', which differs in {", ".join(different[:3])}' if different else ', of other outputs')
        + '. It was changed after it was created: give what is missing as model_args.')
