"""The model card of a Hub folder."""
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import __version__
from ..layers import count_parameters

__all__ = ['CARD', 'OWNER', 'Measured', 'write_card']

CARD = 'README.md'
TEMPLATE = Path(__file__).with_name('card.md')
OWNER = 'OWNER'  # stands there for the publisher
SETTINGS = (
    'model', 'model_kwargs', 'pretrained', 'opt', 'opt_kwargs', 'epochs', 'batch_size', 'grad_accum_steps', 'lr',
    'sched', 'decay_milestones', 'decay_rate', 'min_lr', 'warmup_epochs', 'momentum', 'weight_decay', 'clip_grad',
    'train_crop_mode', 'hflip', 'color_jitter', 'aa', 'reprob', 'mixup', 'cutmix', 'smoothing', 'bce_loss', 'drop',
    'drop_path', 'model_ema', 'amp', 'amp_dtype')


class Measured(NamedTuple):
    """Accuracies in percent, the split that they were measured on, and by which script."""
    split: str
    top1: float
    top5: float
    source: str


def write_card(
        folder: Path,
        model: nn.Module,
        config: Mapping[str, Any],
        args: Optional[Mapping[str, Any]] = None,
        data: str = '',
        data_id: Optional[str] = None,
        measured: Sequence[Measured] = (),
        base_model: Optional[str] = None,
        **facts: Any,
) -> None:
    """Writes the README.md of a Hub folder, of the name that the repository is to have.

    Args:
        folder: The Hub folder.
        model: The model in it.
        config: Its config.json.
        args: The args.yaml of the run of train.py that it comes from; the rest is about that run.
        data: Name of the data set.
        data_id: Its repository on the Hub, if there is one.
        measured: Accuracies of exactly these weights.
        base_model: The repository whose weights the run started from.
        facts: What else the template takes.
    """
    cfg = config['pretrained_cfg']
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_awm', 'active-weighted-mapping'],
        license=cfg.get('license'),
        model_name=folder.name,
        datasets=[data_id] if data_id else None,
        base_model=base_model,
        metrics=['accuracy'] if measured else None,
    )
    card_data.eval_results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=data_id or data,
            dataset_name=data,
            dataset_split=m.split,
            metric_type='accuracy',
            metric_name='Top-1 accuracy, %',
            metric_value=round(m.top1, 2),
        ) for m in measured] or None
    total, in_merges, merges = count_parameters(model)
    args = args or {}
    unused = {'amp_dtype': not args.get('amp'), 'decay_milestones': args.get('sched') != 'multistep'}
    ModelCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding='utf-8'),
        name=folder.name,
        config=config,
        cfg=cfg,
        base=config.get('model_args', {}).get('base'),
        source=_source(),
        total=total,
        in_merges=in_merges,
        merges=merges,
        args=args,
        data=data,
        measured=measured,
        settings=[key for key in SETTINGS if not unused.get(key)],
        versions=dict(timm_awm=__version__, timm=timm.__version__, torch=torch.__version__),
        **facts,
    ).save(folder / CARD)


def _source() -> str:
    """Address of this package's source, empty if its metadata have none."""
    try:
        urls = metadata('timm-awm').get_all('Project-URL') or []
    except PackageNotFoundError:  # a copy of the source
        return ''
    return ''.join(url.removeprefix('Source, ') for url in urls if url.startswith('Source, '))
