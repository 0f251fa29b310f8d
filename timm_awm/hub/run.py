"""From what timm's train.py leaves to a folder for the Hub."""
import argparse
import csv
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
import yaml
from timm.data import create_dataset, resolve_data_config
from timm.models import clean_state_dict

from .. import scripts
from ..utils import new_folder
from .card import Measured, Training, write_card
from .folder import write_model

__all__ = ['export_run', 'read_summary', 'recipe_of', 'without_paths']

# where a path may begin that says something about a machine, and such a path amid other text
START = r'(?:[A-Za-z]:[\\/]|[~$/]|\\\\|\.\.?[\\/])'
WHOLE = re.compile(rf'((?:[\w-]{{2,}}[:/])?){START}.+')
AMID = re.compile(rf'(?<=[\s\'"(\[{{:=,]){START}[^\s\'")\]}},]+')
# of no use to anybody else: where a run was reported, and what it went on from
DROPPED = ('wandb_project', 'wandb_tags', 'wandb_resume_id', 'resume')


def export_run(
        run: Union[str, Path],
        folder: Union[str, Path],
        checkpoint: str = 'last',
        use_ema: bool = True,
        tag: Optional[str] = None,
        license: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
        recipe: Optional[str] = None,
        data_id: Optional[str] = None,
        results: Optional[Mapping[str, Path]] = None,
) -> None:
    """Writes what train.py left of an AWM model as a folder for the Hub.

    Args:
        run: The run's folder, with args.yaml, summary.csv and checkpoints.
        folder: New folder, of the name that the repository is to have.
        checkpoint: 'last', 'best' (of the evaluated epochs), or a file.
        use_ema: Take the averaged weights, if the run kept such. They are what train.py evaluates then.
        tag: Of these weights, such as t3_c10.
        license: Of these weights; if not given, that of the weights of timm which the run started from, apache-2.0 if
            it started from none, and none if it started from those of a file.
        label_names: Of the classes, in order; if not given, those of the data set, if it is at hand.
        recipe: The YAML file, or the name of the recipe, that the run was started with; if not given, one of ours, if
            all that it says is true of the run.
        data_id: The data set's name on the Hub, if args.yaml does not say it.
        results: For a split, such as 'test', what timm's validate.py measured there with --results-file.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: Something is missing in the run.
        ValueError: What is there is damaged or does not fit together.
    """
    run, folder = Path(run), Path(folder)
    args = _read_args(run)
    path = _checkpoint(run, checkpoint)
    epoch, state_dict, is_ema = _read_checkpoint(path, use_ema)
    model = _model(args)
    model.load_state_dict(state_dict)
    start: Mapping[str, Any] = model.pretrained_cfg if args.get('pretrained') else {}  # type: ignore[assignment]
    if args.get('pretrained_path') or args.get('initial_checkpoint'):
        start = {}
        if not license:
            print('Licence: none is stated, for the run started from weights of a file; --license states one.')
    elif not license:
        license = start.get('license') if start else 'apache-2.0'
    data, found_id = _data(args)
    cfg = dict(resolve_data_config(args, model=model))
    cfg.update(
        paper_ids='arXiv:1811.06878',
        description=(
            f'{model.pretrained_cfg["architecture"]} trained on {data}. '  # type: ignore[index]
            'Needs the package timm-awm: pip install timm-awm, import timm_awm.'),
        **(dict(tag=tag) if tag else {}),
        **(dict(license=license) if license else {}),
    )
    rows = read_summary(run)
    measured = [_measured(split, file) for split, file in (results or {}).items()]
    # train.py evaluates the averaged weights, unless they are kept on the CPU; other files may be of other epochs
    evaluated_ema = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
    of_epoch = path.parent.resolve() == run.resolve() and not path.name.startswith('recovery')
    row = rows.get(epoch, {})
    if of_epoch and is_ema == evaluated_ema and row.get('eval_top1'):
        top5 = float(row['eval_top5']) if row.get('eval_top5') else None
        measured.append(Measured(str(args.get('val_split')), float(row['eval_top1']), top5, f'train.py, epoch {epoch}'))
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
    label_names = label_names or _label_names(args, model.num_classes)
    with new_folder(folder) as partial:
        write_model(model, partial, args.get('model_kwargs'), cfg, label_names)
        (partial / 'args.yaml').write_text(yaml.safe_dump(public_args), encoding='utf-8')
        shutil.copyfile(run / 'summary.csv', partial / 'summary.csv')
        source = scripts.find_recipe(recipe) if recipe else recipe_of(args)
        if source:
            _copy_recipe(source, partial / 'recipe.yaml')
        write_card(partial, model, training)


def _model(args: Mapping[str, Any]) -> Any:
    """The model that train.py built of its arguments, with new weights."""
    try:
        return timm.create_model(
            args['model'],
            in_chans=args.get('in_chans') or (args.get('input_size') or [3])[0],
            num_classes=args.get('num_classes'),
            global_pool=args.get('gp'),
            **(args.get('model_kwargs') or {}),
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f'The model of args.yaml cannot be built: {error}') from error


def recipe_of(args: Mapping[str, Any]) -> Optional[Path]:
    """The recipe of this package all of which is true of a run's args.yaml."""
    for path in scripts.recipes().values():
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
        if all(args.get(key) == value for key, value in recipe.items()):
            return path
    return None


def _copy_recipe(source: Path, goal: Path) -> None:
    """As it is, with its comments, if no folder of this machine is named in it."""
    recipe = yaml.safe_load(source.read_text(encoding='utf-8'))
    if without_paths(recipe) == recipe:
        shutil.copyfile(source, goal)
    else:
        goal.write_text(yaml.safe_dump(without_paths(recipe)), encoding='utf-8')


def _read_args(run: Path) -> Dict[str, Any]:
    path = run / 'args.yaml'
    if not path.is_file():
        raise FileNotFoundError(f'There is no args.yaml in {str(run)!r}: it is no folder of a run of train.py.')
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(args, dict) or 'model' not in args:
        raise ValueError(f'{path} does not say which model was trained.')
    return args


def _checkpoint(run: Path, checkpoint: str) -> Path:
    if checkpoint == 'last':
        path = scripts.find_checkpoint(run)
        if path is None:
            raise FileNotFoundError(f'There is no checkpoint in {str(run)!r}.')
        return path
    path = run / 'model_best.pth.tar' if checkpoint == 'best' else Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {str(path)!r}.')
    return path


def _read_checkpoint(path: Path, use_ema: bool) -> Tuple[int, Dict[str, Any], bool]:
    """Epoch and weights of a checkpoint of train.py, and whether they are the averaged ones."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py puts its arguments in
            saved = torch.load(path, map_location='cpu', weights_only=True)
        is_ema = use_ema and saved.get('state_dict_ema') is not None
        return saved['epoch'], clean_state_dict(saved['state_dict_ema' if is_ema else 'state_dict']), is_ema
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} is damaged, or no checkpoint of train.py: {error}') from error


def read_summary(run: Path) -> Dict[int, Dict[str, str]]:
    """The rows of summary.csv by epoch. A resumed run has its header again and may have an epoch twice: the last one
    counts."""
    path = run / 'summary.csv'
    if not path.is_file():
        raise FileNotFoundError(f'There is no summary.csv in {str(run)!r}.')
    try:
        with path.open(newline='', encoding='utf-8') as file:
            return {int(row['epoch']): row for row in csv.DictReader(file) if row['epoch'] != 'epoch'}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is not what train.py writes: {error!r}') from error


def _measured(split: str, path: Path) -> Measured:
    """What validate.py wrote, as JSON or as CSV."""
    text = path.read_text(encoding='utf-8')
    try:
        rows: List[Mapping[str, Any]] = list(csv.DictReader(text.splitlines()))
        if text.lstrip().startswith(('{', '[')):
            read = json.loads(text)
            rows = read if isinstance(read, list) else [read]
        row, = rows
        return Measured(split, float(row['top1']), float(row['top5']), 'validate.py')
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f'{path} is not what validate.py writes about one model: {error}') from error


def _data(args: Mapping[str, Any]) -> Tuple[str, Optional[str]]:
    """The name of a run's data set, and that on the Hub if it came from there."""
    scheme, _, name = str(args.get('dataset') or '').partition('/')
    if scheme == 'hfds' and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) and not Path(name).exists():
        return name, name
    path = name or args.get('data_dir') or args.get('data') or scheme
    return Path(str(path)).name, None


def _label_names(args: Mapping[str, Any], num_classes: int) -> Optional[List[str]]:
    """The names of a data set's classes, or None if it is not at hand or does not tell them."""
    try:
        scheme, _, name = str(args.get('dataset') or '').partition('/')
        if scheme == 'hfds':  # timm's reader would fetch the data too
            import datasets
            features = datasets.load_dataset_builder(name).info.features
            index = {label: i for i, label in enumerate(features[args['target_key']].names)}
        else:
            index = create_dataset(
                args.get('dataset') or '',
                root=args.get('data_dir') or args.get('data'),
                split=args.get('val_split') or 'validation',
                class_map=args.get('class_map') or '',
            ).reader.class_to_idx
    except Exception as error:  # whatever a reader of data that may be gone can raise
        print(f'Label names: not known, for the data set cannot be read ({error!r}); --label-names gives them.')
        return None
    if sorted(index.values()) != list(range(num_classes)):
        print(f'Label names: not known, for the data set does not tell {num_classes}; --label-names gives them.')
        return None
    return sorted(map(str, index), key=index.__getitem__)


def without_paths(value: Any) -> Any:
    """Without the folders of the machine that something was run on: of a path, the last part is left."""
    if isinstance(value, Mapping):
        return {k: without_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    whole = WHOLE.fullmatch(value)
    return whole[1] + _last_part(value) if whole else AMID.sub(lambda match: _last_part(match[0]), value)


def _last_part(path: str) -> str:
    return re.split(r'[\\/]', path.rstrip('\\/'))[-1]
