"""The model card of a Hub folder."""
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import __version__
from ..layers import count_parameters

__all__ = ['CARD', 'OWNER', 'Measured', 'Training', 'describe', 'write_card']

CARD = 'README.md'
OWNER = 'OWNER'  # stands in a card for its publisher
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
LOOK = """

`timm-awm explore hf-hub:{repo_id}` shows the λ of a picture in a browser, beside `lambda.json`, if it is here: mean and
spread of every λ over a data set and over each of its classes, as `timm-awm analyze` finds them."""
SETTINGS = (
    'model', 'model_kwargs', 'pretrained', 'opt', 'opt_kwargs', 'epochs', 'batch_size', 'grad_accum_steps', 'lr',
    'sched', 'decay_milestones', 'decay_rate', 'min_lr', 'warmup_epochs', 'momentum', 'weight_decay',
    'clip_grad', 'train_crop_mode', 'hflip', 'color_jitter', 'aa', 'reprob', 'mixup', 'cutmix', 'smoothing',
    'bce_loss', 'drop', 'drop_path', 'model_ema', 'amp', 'amp_dtype')


class Measured(NamedTuple):
    """Accuracies in percent, the split that they were measured on, and by which script."""
    split: str
    top1: float
    top5: float
    source: str


class Training(NamedTuple):
    """What a card tells about a run of train.py."""
    args: Mapping[str, Any]  # its args.yaml
    epoch: int  # after which the weights were saved, from 0
    weights: str  # the file that they are from
    data: str  # name of the data set
    data_id: Optional[str]  # its repository on the Hub, if there is one
    measured: List[Measured]  # with these weights
    best: Optional[float]  # top-1 accuracy of any epoch of the run, in percent
    base_model: Optional[str]  # the repository whose weights the run started from


def write_card(
        folder: Path,
        model: nn.Module,
        config: Mapping[str, Any],
        training: Optional[Training] = None,
) -> None:
    """Writes the README.md of a Hub folder.

    Args:
        folder: The Hub folder, of the name that the repository is to have.
        model: The model in it.
        config: Its config.json.
        training: The run that it comes from, if it comes from one.
    """
    license = config['pretrained_cfg'].get('license')
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_awm', 'active-weighted-mapping'],
        license=license,
        model_name=folder.name,
    )
    sections = [_head(folder, model, config), _usage(folder, config)]
    if training:
        data.datasets = [training.data_id] if training.data_id else None
        data.base_model = training.base_model
        if training.measured:
            data.metrics = ['accuracy']
            data.eval_results = [_eval_result(training, measured) for measured in training.measured]
        sections.append(_training(training))
    sections.append(f'## Licence and citation\n\n{license or "No licence is stated."}\n\n```bibtex\n{CITATION}\n```')
    ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n').save(folder / CARD)


def describe(folder: Path, model: nn.Module) -> str:
    """What a Hub folder holds, in a few lines.

    Args:
        folder: The Hub folder.
        model: As `load_folder` reads it.
    """
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    total, in_merges, merges = count_parameters(model)
    lines = [
        cfg['architecture'] + (f', tag {cfg["tag"]}' if cfg.get('tag') else ''),
        cfg.get('description') or 'no description',
        f'{total:,} parameters, {in_merges:,} of them in {merges} merges; {model.num_classes} classes; licence: '
        f'{cfg.get("license") or "not stated"}',
    ]
    card = folder / CARD
    results = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results if card.is_file() else None
    for r in results or []:
        lines.append(f'{r.metric_name or r.metric_type}: {r.metric_value} on {r.dataset_name}, {r.dataset_split}')
    return '\n'.join(lines)


def _eval_result(training: Training, measured: Measured) -> EvalResult:
    return EvalResult(
        task_type='image-classification',
        dataset_type=training.data_id or training.data,
        dataset_name=training.data,
        dataset_split=measured.split,
        metric_type='accuracy',
        metric_name='Top-1 accuracy, %',
        metric_value=measured.top1,
    )


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
    weights, look = RECORD, LOOK.format(repo_id=f'{OWNER}/{folder.name}')
    if config.get('model_args', {}).get('awm') is False:
        weights = look = ''
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
{weights}```{look}"""


def _training(training: Training) -> str:
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
        *(f'| {m.split} | {m.top1:.2f} | {m.top5:.2f} | {m.source} |' for m in training.measured),
    ]
    if training.best is not None:
        lines += ['', f'The best epoch of the run had {training.best:.2f} % on `{args.get("val_split")}`.']
    lines += [
        '',
        "With timm's own, unmodified train.py; `timm-awm train -c args.yaml` starts it again, once the paths in it "
        'are yours. All settings are in `args.yaml`, every epoch is in `summary.csv`. Among them:',
        '',
        *(f'- {key}: {value}' for key, value in settings),
        '',
        f'Written with timm_awm {__version__}, timm {timm.__version__}, torch {torch.__version__}.',
    ]
    return '\n'.join(lines)
