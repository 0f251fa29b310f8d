"""The model card of a Hub folder."""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Mapping, Optional

import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import __version__
from ..layers import count_parameters

__all__ = ['OWNER', 'Measured', 'Training', 'describe', 'write_card']

OWNER = 'OWNER'  # stands in a card for who is going to publish it
CITATION = """\
@article{jung2018residual,
  title   = {Residual Convolutional Neural Network Revisited with Active Weighted Mapping},
  author  = {Jung, HyoungHo and Lee, Ryong and Lee, Sanghwan and Hwang, Wonjun},
  journal = {arXiv preprint arXiv:1811.06878},
  year    = {2018}
}"""
RECORD = """
with timm_awm.record_mixing_weights(model) as lambdas:  # how the merges weighed their paths
    model(transform(image).unsqueeze(0))
"""
SETTINGS = (
    'model', 'model_kwargs', 'pretrained', 'opt', 'opt_kwargs', 'epochs', 'batch_size', 'grad_accum_steps', 'lr',
    'sched', 'decay_milestones', 'decay_rate', 'min_lr', 'warmup_epochs', 'momentum', 'weight_decay',
    'clip_grad', 'train_crop_mode', 'hflip', 'color_jitter', 'aa', 'reprob', 'mixup', 'cutmix', 'smoothing',
    'bce_loss', 'drop', 'drop_path', 'model_ema', 'amp', 'amp_dtype')


@dataclass
class Measured:
    """Accuracies of the weights in percent, the split that they were measured on, and by what."""
    split: str
    top1: float
    top5: Optional[float]
    source: str


@dataclass
class Training:
    """What a card tells about a run of train.py.

    Args:
        args: Its args.yaml.
        epoch: After which the weights were saved, counted from 0.
        weights: The file that they are from.
        data: Name of the data set.
        data_id: That on the Hub, if it is there.
        measured: Results of these weights.
        best: The best top-1 accuracy of any epoch of the run, in percent.
        base_model: The Hub's repository whose weights the run started from.
    """
    args: Mapping[str, Any]
    epoch: int
    weights: str
    data: str
    data_id: Optional[str] = None
    measured: List[Measured] = field(default_factory=list)
    best: Optional[float] = None
    base_model: Optional[str] = None


def write_card(folder: Path, model: nn.Module, training: Optional[Training] = None) -> None:
    """Writes README.md beside the config.json and model.safetensors of a Hub folder.

    Args:
        folder: The Hub folder, whose name is to be that of the repository.
        model: The model in it.
        training: The run that it comes from, if it comes from one.
    """
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    cfg = config['pretrained_cfg']
    license = cfg.get('license')
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_awm', 'active-weighted-mapping'],
        license=license,
        model_name=folder.name,
        datasets=[training.data_id] if training and training.data_id else None,
        base_model=training.base_model if training else None,
        metrics=['accuracy'] if training and training.measured else None,
        eval_results=_eval_results(training) if training else None,
    )
    sections = [_head(folder, model, config), _usage(folder, config)]
    if training:
        sections.append(_training(folder, training))
    sections.append(f'## Licence and citation\n\n{license or "No licence is stated."}\n\n```bibtex\n{CITATION}\n```')
    ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n').save(folder / 'README.md')


def describe(folder: Path, model: nn.Module) -> str:
    """What a Hub folder holds, in a few lines.

    Args:
        folder: The Hub folder.
        model: The model in it.
    """
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    cfg = config.get('pretrained_cfg', config)
    total, in_merges, merges = count_parameters(model)
    lines = [
        ', '.join([config['architecture'], *(f'tag {tag}' for tag in [cfg.get('tag')] if tag)]),
        cfg.get('description') or 'no description',
        f'{total:,} parameters, {in_merges:,} of them in {merges} merges; {model.num_classes} classes; licence: '
        f'{cfg.get("license") or "not stated"}',
    ]
    try:
        results = ModelCard.load(folder / 'README.md', ignore_metadata_errors=True).data.eval_results or []
    except (OSError, ValueError, yaml.YAMLError):  # anybody's, or none
        results = []
    lines += [
        f'{result.metric_name or result.metric_type}: {result.metric_value} on {result.dataset_name}, '
        f'{result.dataset_split}'
        for result in results
    ]
    return '\n'.join(lines)


def _eval_results(training: Training) -> Optional[List[EvalResult]]:
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=training.data_id or training.data,
            dataset_name=training.data,
            dataset_split=measured.split,
            metric_type='accuracy',
            metric_name='Top-1 accuracy, %',
            metric_value=measured.top1,
        )
        for measured in training.measured
    ] or None


def _head(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> str:
    total, in_merges, merges = count_parameters(model)
    architecture = config['architecture']
    base = config.get('model_args', {}).get('base')
    cfg = config['pretrained_cfg']
    size = 'x'.join(map(str, cfg['input_size']))
    what = (
        f'`{architecture}`{f" of `{base}`" if base else ""}, a network with *active weighted mapping* (AWM): at '
        f'{merges} places it weighs its paths for each image anew, where the plain network adds them up or '
        'concatenates them.' if merges else
        f'`{architecture}` with `awm=False`: the plain control of a network with active weighted mapping (AWM).')
    return (
        f'# {folder.name}\n\n{what}\n\n'
        'It needs the package `timm-awm`, which makes the architecture known to timm: without `import timm_awm`, timm '
        f'says "Unknown model ({architecture})".\n\n'
        f'- Parameters: {total:,}, of them {in_merges:,} in merges\n'
        f'- Images: {size}, mean {tuple(cfg["mean"])}, standard deviation {tuple(cfg["std"])}\n'
        f'- Classes: {config["num_classes"]}')


def _usage(folder: Path, config: Mapping[str, Any]) -> str:
    weights = '' if config.get('model_args', {}).get('awm') is False else RECORD
    mode = ' of mode L' if config['pretrained_cfg']['input_size'][0] == 1 else ''
    return f"""\
## Usage

```sh
pip install timm-awm
```

```python
import timm_awm  # makes the architecture known to timm
import timm

model = timm.create_model('hf-hub:{OWNER}/{folder.name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
logits = model(transform(image).unsqueeze(0))  # image: a PIL image{mode}
{weights}```"""


def _training(folder: Path, training: Training) -> str:
    args = training.args
    unused = {'amp_dtype': not args.get('amp'), 'decay_milestones': args.get('sched') != 'multistep'}
    settings = [
        (key, args[key]) for key in SETTINGS
        if args.get(key) not in (None, False, 0, '', {}, []) and not unused.get(key)]
    settings.append(('seed', args.get('seed')))
    splits = f'trained on `{args.get("train_split")}`, evaluated after every epoch on `{args.get("val_split")}`'
    lines = [
        '## Training',
        '',
        f'{training.data}, {splits}. The weights are those of `{training.weights}`, after {training.epoch + 1} of '
        f'{args.get("epochs")} passes over the training data.',
        '',
        '| measured on | top-1, % | top-5, % | by |',
        '| --- | ---: | ---: | --- |',
        *(
            f'| {m.split} | {m.top1:.2f} | {"" if m.top5 is None else f"{m.top5:.2f}"} | {m.source} |'
            for m in training.measured
        ),
    ]
    if training.best is not None:
        lines += ['', f'The best epoch of the run had {training.best:.2f} % on `{args.get("val_split")}`.']
    recipe = 'recipe.yaml' if (folder / 'recipe.yaml').is_file() else 'args.yaml'
    lines += [
        '',
        f"With timm's own, unmodified train.py; `timm-awm train -c {recipe}` starts it again, once the paths in it are "
        'yours. All settings are in `args.yaml`, every epoch is in `summary.csv`. Among them:',
        '',
        *(f'- {key}: {value}' for key, value in settings),
        '',
        f'Written with timm_awm {__version__}, timm {timm.__version__}, torch {torch.__version__}.',
    ]
    return '\n'.join(lines)
