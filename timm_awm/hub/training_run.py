"""The reader of what timm's train.py and validate.py leave of a run."""
import csv
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Dict, List, Mapping, Optional, Tuple

import yaml
from timm.data import create_dataset
from timm.models import clean_state_dict
from timm.utils import load_checkpoint_metadata

PRIVATE = 'private'  # stands for an address or a command


@dataclass
class TrainingRun:
    """A folder that train.py writes. Its properties raise FileNotFoundError if a file is missing, ValueError if it is
    damaged."""
    folder: Path

    @cached_property
    def args(self) -> Dict[str, Any]:
        """The arguments of train.py, from args.yaml."""
        path = self.folder / 'args.yaml'
        if not path.is_file():
            raise FileNotFoundError(f'{self.folder} is no run of train.py: it has no args.yaml.')
        try:
            args = yaml.safe_load(path.read_text(encoding='utf-8'))
            args['model']
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is not what train.py writes: {error!r}') from error
        return args

    @cached_property
    def summary(self) -> Dict[int, Dict[str, str]]:
        """The rows of summary.csv by epoch. A resumed run writes its header, maybe an epoch again: the last counts."""
        path = self.folder / 'summary.csv'
        try:
            with path.open(newline='', encoding='utf-8') as file:
                return {int(row['epoch']): row for row in csv.DictReader(file) if row['epoch'] != 'epoch'}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is not what train.py writes: {error!r}') from error

    def label_names(self, num_classes: int) -> Optional[List[str]]:
        """The names of the classes, or None if the data set is not at hand or does not tell them."""
        args = self.args
        dataset = str(args.get('dataset') or '')
        try:
            if dataset.startswith('hfds/'):  # timm's reader would fetch the data too
                import datasets
                builder = datasets.load_dataset_builder(dataset.removeprefix('hfds/'))
                # files on disk that were not read before tell in their schema
                features = builder.info.features or next(iter(builder.as_streaming_dataset().values())).features
                names = list(features[args['target_key']].names)
            else:
                root, class_map = args.get('data_dir') or args.get('data'), args.get('class_map') or ''
                data: Any = create_dataset(dataset, root=root, split=args['val_split'], class_map=class_map)
                index = getattr(data, 'reader', data).class_to_idx  # torchvision's have no reader
                names = sorted(index, key=index.__getitem__)
            if len(names) != num_classes:
                raise ValueError(f'it does not have {num_classes} classes')
        except Exception as error:  # readers of data that may be gone raise anything
            print(f'Label names: not known from the data set ({error!r}); --label-names gives them.')
            return None
        return names


def last_part(path: str) -> str:
    """The last part of a path, of Windows too; 'private' for an address or a command, which may hold secrets."""
    if re.search('[:?@]', path[2:]):  # behind the colon of a drive
        return PRIVATE
    return PureWindowsPath(os.path.abspath(path)).name


def data_name(args: Mapping[str, Any]) -> Tuple[str, Optional[str]]:
    """The name of the data set, and that on the Hub if it comes from there. Arguments are those of timm's scripts."""
    scheme, _, name = str(args.get('dataset') or '').partition('/')
    if scheme == 'hfds' and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) and not Path(name).exists():
        return name, name
    return last_part(str(name or args.get('data_dir') or args.get('data') or scheme)), None


def read_checkpoint(path: Path, use_ema: bool) -> Tuple[int, Dict[str, Any], bool]:
    """Epoch and weights of a checkpoint of train.py, and whether they are the averaged ones."""
    try:
        saved = load_checkpoint_metadata(path)
        is_ema = use_ema and saved.get('state_dict_ema') is not None
        return saved['epoch'], clean_state_dict(saved['state_dict_ema' if is_ema else 'state_dict']), is_ema
    except (RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f'{path} is damaged, or no checkpoint of train.py: {error}') from error


def read_results(split: str, path: Path) -> Dict[str, Any]:
    """Accuracies that validate.py wrote about one model, as JSON or as CSV."""
    text = path.read_text(encoding='utf-8-sig')
    try:
        row, = [json.loads(text)] if text.startswith('{') else csv.DictReader(text.splitlines())
        return dict(split=split, top1=float(row['top1']), top5=float(row['top5']), source='validate.py')
    except (KeyError, ValueError) as error:
        raise ValueError(f'{path} is not what validate.py writes about one model: {error}') from error
