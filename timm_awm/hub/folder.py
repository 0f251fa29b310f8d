"""A model as the Hub keeps it: a folder with config.json, model.safetensors and README.md, from which
`timm.create_model('local-dir:...')` and, once it is published, `timm.create_model('hf-hub:...')` build it again.
"""
import json
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Union

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import DenseNet, ResNet, save_for_hf
from torch import nn

from ..models.checkpoint import SAFETENSORS
from ..utils import new_folder
from .card import write_card

CONFIG = 'config.json'
REFERENCE = 'lambda.json'  # written by timm_awm.analysis.reference
NEEDS = 'Needs the package timm_awm: import timm_awm.'  # in descriptions
# true of a model with any weights; the rest of a name's `pretrained_cfg` is about those that timm has for it
KEPT = (
    'input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'num_classes',
    'pool_size', 'first_conv', 'classifier', 'custom_load')
LabelNames = Union[Sequence[str], Mapping[Any, str]]


def save_for_hub(
        model: nn.Module,
        folder: Union[str, Path],
        model_args: Optional[Mapping[str, Any]] = None,
        pretrained_cfg: Optional[Mapping[str, Any]] = None,
        label_names: Optional[LabelNames] = None,
) -> None:
    """Writes a model, a converted one too, as a folder for the Hub: weights, configuration and a card.

    The model is built again from the folder and compared: keys, shapes, and outputs in eval mode.

    Args:
        model: An AWM model or a plain control that timm created or `timm_awm.convert` changed; it stays as it is.
        folder: New folder.
        model_args: Arguments that build the model again, beside those that it was created with, which timm records.
        pretrained_cfg: Facts about these weights that the model's own `pretrained_cfg` lacks: tag, license,
            description; mean, std, input_size, ... that they were trained with.
        label_names: Names of the classes, in order, or by index (default: those of the model's `pretrained_cfg`).

    Raises:
        FileExistsError: The folder exists.
        ValueError: The configuration builds another model, or there are not as many label names as classes.
    """
    with new_folder(Path(folder)) as partial:
        write_folder(model, partial, model_args or {}, pretrained_cfg or {}, label_names)


def write_folder(
        model: nn.Module,
        folder: Path,
        model_args: Mapping[str, Any],
        pretrained_cfg: Mapping[str, Any],
        label_names: Optional[LabelNames],
        **run: Any,
) -> None:
    """Does what `save_for_hub` does, into a folder that exists; the card has facts about a run, as for `write_card`."""
    built = isinstance(model, (ResNet, DenseNet)) and getattr(model, 'pretrained_cfg', {}).get('architecture') or ''
    if not built.startswith('awm_'):
        raise ValueError(
            f'This {type(model).__name__} was not created under the name of an AWM model, by which it could be built '
            'again: use timm.create_model, or timm_awm.convert on a model of timm, and save it before it is wrapped or '
            "compiled. timm's own models are saved by timm.models.save_for_hf.")
    if label_names and not isinstance(label_names, Mapping) and len(label_names) != model.num_classes:
        raise ValueError(f'There are {len(label_names)} label names for {model.num_classes} classes.')
    # a copy, for safetensors takes no channels-last tensors
    model = deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    save_for_hf(model, str(folder), model_args=dict(model_args), safe_serialization=True)
    (folder / SAFETENSORS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read it
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)  # at the top already; transformers refuses it twice
    cfg = config['pretrained_cfg']
    own_names = cfg.pop('label_names', None)
    if label_names or own_names:
        config['label_names'] = class_names(label_names or own_names, model.num_classes)
    if model.pretrained_cfg.get('source') not in ('hf-hub', 'local-dir'):
        cfg = {k: v for k, v in cfg.items() if k in KEPT}
    cfg = {'description': f'{config["architecture"]}. {NEEDS}', **cfg, **pretrained_cfg}
    config['pretrained_cfg'] = {k: v for k, v in cfg.items() if v is not None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding='utf-8')
    advice = 'Was it changed after it was created? Then give what is missing as model_args.'
    with torch_defaults(), torch.inference_mode():
        try:
            rebuilt = load_folder(folder).eval()
        except ValueError as error:
            raise ValueError(f'The configuration builds another model than this one: {error} {advice}') from error
        images = torch.rand(2, *rebuilt.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
        if not torch.allclose(model.float()(images), rebuilt.float()(images), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f'The configuration builds a model of other outputs than this one. {advice}')
    write_card(folder, model, config, **run)


def load_folder(folder: Union[str, Path]) -> nn.Module:
    """The model of a Hub folder, with exactly the weights in its model.safetensors.

    Raises:
        ValueError: The folder is damaged, incomplete, or does not fit together; says what is wrong.
    """
    folder = Path(folder)
    try:
        weights = load_file(folder / SAFETENSORS)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f'{folder} holds no whole AWM model: {type(error).__name__}: {error}') from error
    architecture = model.pretrained_cfg['architecture']
    if not architecture.startswith('awm_'):
        raise ValueError(f'{folder} holds a {architecture}, which is no AWM model.')
    own = model.state_dict()  # timm starts a new classifier if the number of classes differs
    other = sorted(k for k in own if k not in weights or not torch.equal(own[k], weights[k].to(own[k])))
    if other:
        raise ValueError(
            f'{folder / CONFIG} builds a {architecture} that does not take all weights of {SAFETENSORS}: its '
            f'{", ".join(other[:3])} would be new. Its num_classes or model_args are wrong.')
    return model


def class_names(label_names: Optional[LabelNames], num_classes: int) -> List[str]:
    """The name of every class, its index where there is none, from a list or a dict by index, as timm takes them. In
    JSON, such an index is a string.

    Raises:
        ValueError: There are names of other classes.
    """
    by_index = label_names if isinstance(label_names, Mapping) else dict(enumerate(label_names or ()))
    names = {int(index): str(name) for index, name in by_index.items()}
    if not names.keys() <= set(range(num_classes)):
        raise ValueError(f'Label names have the indices {min(names)} to {max(names)}: there are {num_classes} classes.')
    return [names.get(index, str(index)) for index in range(num_classes)]


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Makes new tensors float32 on the CPU, whatever defaults the caller has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device('cpu'):
            yield
    finally:
        torch.set_default_dtype(dtype)
