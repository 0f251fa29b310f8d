"""What timm's train.py leaves of a run, and the Hub folder that is written from it."""
import csv
import json
import re
import shutil
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import yaml
from timm.data import create_dataset, resolve_input_data_config
from timm.models import clean_state_dict
from timm.utils import load_checkpoint_metadata

from ..utils import new_folder
from .card import Measured, Training, write_card
from .folder import NEEDS, write_model

__all__ = ['TrainingRun', 'export_run', 'without_paths']

URL = re.compile(r'((?!file:)\b[\w+.-]{2,}://\S+)')
# an absolute path, or one from a home or a folder above, up to a quote; after a scheme, such as hfds/, or alone
PATH = re.compile(r"""((?:^|[\s'"(\[{=,])(?:[\w-]{2,}[:/])?)(?:[A-Za-z]:[\\/]|[~$/\\]|\.\.?[\\/])[^'"]*""")
# of no use to others: where a run was reported, and what it went on from
DROPPED = ('wandb_project', 'wandb_tags', 'wandb_resume_id', 'resume')


class TrainingRun:
    """A folder that train.py writes: arguments, a summary of every epoch, checkpoints.

    Args:
        folder: The run's folder; it may not exist yet.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self.folder = Path(folder)

    @cached_property
    def args(self) -> Dict[str, Any]:
        """args.yaml.

        Raises:
            FileNotFoundError: It does not exist.
            ValueError: It is damaged.
        """
        path = self.folder / 'args.yaml'
        try:
            args = yaml.safe_load(path.read_text(encoding='utf-8'))
            args['model']
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is not what train.py writes: {error!r}') from error
        return args

    @cached_property
    def summary(self) -> Dict[int, Dict[str, str]]:
        """The rows of summary.csv by epoch. A resumed run has its header again and may have an epoch twice: the last
        one counts.

        Raises:
            FileNotFoundError: It does not exist.
            ValueError: It is damaged.
        """
        path = self.folder / 'summary.csv'
        try:
            with path.open(newline='', encoding='utf-8') as file:
                return {int(row['epoch']): row for row in csv.DictReader(file) if row['epoch'] != 'epoch'}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is not what train.py writes: {error!r}') from error

    def last_checkpoint(self) -> Optional[Path]:
        """The newest whole checkpoint of an epoch's end, or None.

        A run that was killed may leave a checkpoint half-written, or the newest one only as `tmp.pth.tar`, which timm
        renames to `last.pth.tar`. Recovery checkpoints are not taken: train.py would leave out the rest of their epoch.

        Raises:
            ValueError: All checkpoints are damaged.
        """
        numbered = {
            int(match[1]): path for path in self.folder.glob('*')
            if (match := re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', path.name))}
        kept = [*self.folder.glob('last.pth.tar'), *(numbered[epoch] for epoch in sorted(numbered, reverse=True))]
        for path in (*self.folder.glob('tmp.pth.tar'), *kept):
            if _is_whole(path):
                return path
        if kept:
            raise ValueError(f'Every checkpoint in {str(self.folder)!r} is damaged: move it away to start again.')
        return None

    def checkpoint(self, which: str) -> Path:
        """'last', 'best' (of the evaluated epochs), or a file."""
        if which == 'last':
            return self.last_checkpoint() or self.folder / 'last.pth.tar'
        return self.folder / 'model_best.pth.tar' if which == 'best' else Path(which)

    def label_names(self, num_classes: int) -> Optional[List[str]]:
        """The names of the classes, or None if the data set is not at hand or does not tell them."""
        try:
            scheme, _, name = str(self.args.get('dataset') or '').partition('/')
            if scheme == 'hfds':  # timm's reader would fetch the data too
                import datasets
                builder = datasets.load_dataset_builder(name)
                # files on disk that were not read before tell in their schema
                features = builder.info.features or next(iter(builder.as_streaming_dataset().values())).features
                index = {label: i for i, label in enumerate(features[self.args['target_key']].names)}
            else:
                dataset: Any = create_dataset(
                    self.args.get('dataset') or '',
                    root=self.args.get('data_dir') or self.args.get('data'),
                    split=self.args.get('val_split') or 'validation',
                    class_map=self.args.get('class_map') or '',
                )
                index = getattr(dataset, 'reader', dataset).class_to_idx  # torchvision's have no reader
            if sorted(index.values()) != list(range(num_classes)):
                raise ValueError(f'it does not have {num_classes} classes')
        except Exception as error:  # readers of data that may be gone raise anything
            print(f'Label names: not known from the data set ({error!r}); --label-names gives them.')
            return None
        return sorted(map(str, index), key=index.__getitem__)


def export_run(
        run: Union[str, Path],
        folder: Union[str, Path],
        checkpoint: str = 'last',
        use_ema: bool = True,
        tag: Optional[str] = None,
        license: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
        data_id: Optional[str] = None,
        results: Optional[Mapping[str, Path]] = None,
) -> None:
    """Writes what train.py left of an AWM model as a folder for the Hub.

    Args:
        run: The run's folder.
        folder: New folder, of the name that the repository is to have.
        checkpoint: 'last', 'best' (of the evaluated epochs), or a file.
        use_ema: Take the averaged weights, if the run has them. train.py evaluates these.
        tag: Of these weights, such as t3_c10.
        license: Of these weights; if not given, that of timm's weights from which the run started, apache-2.0 if it
            started from none, no licence if it started from a file.
        label_names: Of the classes, in order; if not given, those of the data set, if it is at hand.
        data_id: The data set's name on the Hub, if args.yaml does not say it.
        results: For a split, such as 'test', what timm's validate.py measured there with --results-file. It stands in
            place of what train.py measured on this split.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: Something is missing in the run.
        RuntimeError: The checkpoint does not fit the model of args.yaml.
        ValueError: A file is damaged, or files do not fit together.
    """
    trained = TrainingRun(run)
    args, rows = trained.args, trained.summary
    path = trained.checkpoint(checkpoint)
    epoch, state_dict, is_ema = _read_checkpoint(path, use_ema)
    model: Any = timm.create_model(  # as train.py does
        args['model'],
        in_chans=args.get('in_chans') or (args.get('input_size') or [3])[0],
        num_classes=args.get('num_classes'),
        global_pool=args.get('gp'),
        **(args.get('model_kwargs') or {}),
    )
    model.load_state_dict(state_dict)
    from_file = args.get('pretrained_path') or args.get('initial_checkpoint')
    start: Mapping[str, Any] = model.pretrained_cfg if args.get('pretrained') and not from_file else {}
    if not license and not from_file:
        license = start.get('license') if start else 'apache-2.0'
    data, found_id = data_name(args)
    cfg = dict(
        resolve_input_data_config(model, args),
        paper_ids='arXiv:1811.06878',
        description=f'{model.pretrained_cfg["architecture"]} trained on {data}. {NEEDS}',
    )
    cfg.update({key: value for key, value in (('tag', tag), ('license', license)) if value})
    results = results or {}
    measured = [_measured(split, file) for split, file in results.items()]
    # train.py evaluates the averaged weights, unless they are kept on the CPU; other files may be of other epochs
    evaluated_ema = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
    of_epoch = path.parent.resolve() == trained.folder.resolve() and not path.name.startswith('recovery')
    row = rows.get(epoch, {})
    if of_epoch and is_ema == evaluated_ema and row.get('eval_top1') and args['val_split'] not in results:
        measured.append(Measured(
            args['val_split'], float(row['eval_top1']), float(row['eval_top5']), f'train.py, epoch {epoch}'))
    public_args = {k: v for k, v in without_paths(args).items() if k not in DROPPED}
    training = Training(
        args=public_args,
        epoch=epoch,
        weights=path.name + (', averaged (EMA)' if is_ema else ''),
        data=data,
        data_id=data_id or found_id,
        measured=measured,
        best=max((float(row['eval_top1']) for row in rows.values() if row.get('eval_top1')), default=None),
        base_model=start.get('hf_hub_id'),
    )
    label_names = label_names or trained.label_names(model.num_classes)
    with new_folder(Path(folder)) as partial:
        config = write_model(model, partial, None, cfg, label_names)
        (partial / 'args.yaml').write_text(yaml.safe_dump(public_args), encoding='utf-8')
        shutil.copyfile(trained.folder / 'summary.csv', partial / 'summary.csv')
        write_card(partial, model, config, training)


def data_name(args: Mapping[str, Any]) -> Tuple[str, Optional[str]]:
    """The name of the data set, and that on the Hub if it comes from there. Arguments are those of timm's scripts."""
    scheme, _, name = str(args.get('dataset') or '').partition('/')
    if scheme == 'hfds' and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) and not Path(name).exists():
        return name, name
    path = name or args.get('data_dir') or args.get('data') or scheme
    return Path(str(path)).name, None


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError):  # what damage can raise
        return False


def _read_checkpoint(path: Path, use_ema: bool) -> Tuple[int, Dict[str, Any], bool]:
    """Epoch and weights of a checkpoint of train.py, and whether they are the averaged ones."""
    try:
        saved = load_checkpoint_metadata(path)
        is_ema = use_ema and saved.get('state_dict_ema') is not None
        return saved['epoch'], clean_state_dict(saved['state_dict_ema' if is_ema else 'state_dict']), is_ema
    except (RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} is damaged, or no checkpoint of train.py: {error}') from error


def _measured(split: str, path: Path) -> Measured:
    """What validate.py wrote, as JSON or as CSV."""
    text = path.read_text(encoding='utf-8')
    try:
        row, = [json.loads(text)] if text.startswith('{') else csv.DictReader(text.splitlines())
        return Measured(split, float(row['top1']), float(row['top5']), 'validate.py')
    except (KeyError, ValueError) as error:
        raise ValueError(f'{path} is not what validate.py writes about one model: {error}') from error


def without_paths(value: Any) -> Any:
    """Without the folders of the machine: of a path, the last part is left. URLs stay."""
    if isinstance(value, Mapping):
        return {k: without_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    parts = URL.split(value)  # every second is a URL
    parts[::2] = [PATH.sub(lambda path: path[1] + re.split(r'[\\/]', path[0].rstrip('\\/'))[-1], s) for s in parts[::2]]
    return ''.join(parts)
