"""The model card of a Hub folder."""
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Mapping

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import __version__
from ..layers import count_parameters

CARD = 'README.md'
TEMPLATE = Path(__file__).with_name('card.md')
OWNER = 'OWNER'  # stands there for the publisher
SETTINGS = (
    'model', 'model_kwargs', 'pretrained', 'opt', 'opt_kwargs', 'epochs', 'batch_size', 'grad_accum_steps', 'lr',
    'sched', 'decay_milestones', 'warmup_epochs', 'momentum', 'weight_decay', 'train_crop_mode', 'aa', 'reprob',
    'mixup', 'cutmix', 'smoothing', 'drop', 'drop_path', 'model_ema', 'amp', 'amp_dtype', 'seed')


def write_card(folder: Path, model: nn.Module, config: Mapping[str, Any], **run: Any) -> None:
    """Writes the README.md of a Hub folder, of the name that the repository is to have, for its model and config.json.

    Args:
        run: Facts about the run of train.py, if it comes from one: public `args`; `data` and, if that is on the Hub,
            `data_id`; `weights`, the file that they are from; `epoch` after which they were saved, from 0; `measured`,
            dicts of a `split`, its `top1` and `top5` in percent and the `source`, a script; `best` top-1 accuracy of
            all epochs; `base_model` that it started from.
    """
    args = run.get('args', {})
    unused = {'amp_dtype': not args.get('amp'), 'decay_milestones': args.get('sched') != 'multistep'}
    data_id, measured = run.get('data_id'), run.get('measured')
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_awm', 'active-weighted-mapping'],
        license=config['pretrained_cfg'].get('license'),
        model_name=folder.name,
        datasets=[data_id] if data_id else None,
        base_model=run.get('base_model'),
        metrics=['accuracy'] if measured else None,
        eval_results=[
            EvalResult(
                task_type='image-classification', dataset_type=data_id or run['data'], dataset_name=run['data'],
                dataset_split=m['split'], metric_type='accuracy', metric_name='Top-1 accuracy, %',
                metric_value=round(m['top1'], 2)) for m in measured] if measured else None,
    )
    ModelCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding='utf-8'),
        name=folder.name, config=config, cfg=config['pretrained_cfg'],
        base=config.get('model_args', {}).get('base'), counts=count_parameters(model), source=_source(),
        settings=[key for key in SETTINGS if not unused.get(key)],
        versions=dict(timm_awm=__version__, timm=timm.__version__, torch=torch.__version__),
        **run,
    ).save(folder / CARD)


def _source() -> str:
    """Address of this package's source, empty if its metadata have none."""
    try:
        urls = metadata('timm-awm').get_all('Project-URL') or []
    except PackageNotFoundError:  # a copy of the source
        return ''
    source = ''.join(url.removeprefix('Source, ') for url in urls if url.startswith('Source, '))
    return '' if '//example.org/' in source else source  # until a release sets it
