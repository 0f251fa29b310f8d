"""`timm-awm train`: timm's own train.py with timm_awm loaded."""
import os
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

import yaml

from . import scripts
from .validate import describe, given_flags

TAKES_REST = True

HELP = "run timm's own train.py"
DATA = 'dataset', 'input_key', 'target_key', 'train_split', 'val_split', 'num_classes'
# timm's defaults and what it takes for the same
SPLITS = dict(train_split=('train', 'training'), val_split=('validation', 'val', 'valid', 'eval', 'evaluation'))


def add_arguments(parser: ArgumentParser) -> None:
    describe(
        parser, 'train', 'timm-awm train -c cifar10/awm_resnet20_cifar --epochs 24 --decay-milestones 11 18\n'
        'Pictures of your own, in FOLDER/train/CLASS and FOLDER/val/CLASS:\n'
        '  timm-awm train -c finetune/awm_resnet50 --data-dir FOLDER\n'
        'Several processes: torchrun --nproc_per_node=2 -m timm_awm train -c RECIPE')
    parser.add_argument(
        '-c', '--config', metavar='FILE',
        help='a YAML file, or a recipe (timm-awm recipes). --data-dir replaces all that it says of its data, and the '
             'classes in the folder are counted; --dataset replaces the name of the data set alone')
    parser.add_argument('--output', metavar='DIR', help='folder for runs (default: output/train)')
    parser.add_argument('--experiment', metavar='NAME', help="name of the run's folder in it (default: time and model)")
    parser.add_argument(
        '--resume', metavar='FILE',
        help="a checkpoint, or 'auto' for the newest undamaged one of the experiment, if any")
    parser.add_argument('--device-modules', nargs='+', metavar='NAME', help='modules to import besides timm_awm')


def run(args: Namespace) -> None:
    command = [str(scripts.find_script('train', args.script))]
    path = args.config and scripts.find_recipe(args.config)
    recipe = _read(path) if path else {}
    given = given_flags(args.rest, *(key for key, value in recipe.items() if isinstance(value, dict)))
    config = adapt(recipe, given)
    if config != recipe:  # no flag takes a key back, so train.py gets another file, which it reads at once
        with tempfile.NamedTemporaryFile('w', prefix='timm-awm-', suffix='.yaml', delete=False) as file:
            yaml.safe_dump(config, file)
        path = file.name
    resume = config.get('resume') if args.resume is None else args.resume
    if resume == 'auto':
        name = args.experiment or config.get('experiment')
        if not name:
            raise ValueError('--resume auto needs --experiment NAME, for without it each start makes a new folder.')
        if 'start_epoch' in given:
            raise ValueError('--resume auto takes the epoch from the checkpoint: leave --start-epoch out.')
        folder = Path(args.output or config.get('output') or 'output/train', str(name))
        checkpoint = scripts.last_checkpoint(folder)
        scripts.say(f'resumes from {checkpoint}' if checkpoint else 'has no checkpoint to resume from, starts the run')
        resume = str(checkpoint or '')
    flags = {'-c': path, '--output': args.output, '--experiment': args.experiment, '--resume': resume}
    command += [str(part) for flag in flags.items() if flag[1] is not None for part in flag]
    command += scripts.device_flags({**config, **given})
    modules = args.device_modules or config.get('device_modules') or []
    end = args.rest.index('--') if '--' in args.rest else len(args.rest)
    # last, as it takes all values that follow
    modules = ['--device-modules', 'timm_awm', *(name for name in modules if name != 'timm_awm')]
    scripts.become([*command, *args.rest[:end], *modules, *args.rest[end:]])


def adapt(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Dict[str, Any]:
    """A recipe without what gives way to the given flags; says what that is."""
    config = dict(recipe)
    for key, value in recipe.items():
        if isinstance(value, dict) and key in given:  # train.py replaces the whole
            named = {text.partition('=')[0] for text in given[key]}
            _say_left_out(f'--{key.replace("_", "-")}', {k: v for k, v in value.items() if k not in named})
    folder, dataset = given.get('data_dir'), given.get('dataset')
    if dataset == '' and not folder:
        raise ValueError("--dataset '' means a folder of pictures: name it by --data-dir.")
    if folder and not dataset and not os.path.exists(folder):
        raise FileNotFoundError(f'There is no folder {folder} (--data-dir).')
    if folder and config.get('dataset') and not (dataset or '').startswith('hfds/'):  # there a cache
        _say_left_out('--data-dir', {key: config.pop(key) for key in DATA if key in config})
        if not dataset and os.path.isdir(folder):
            train, _ = [_split_folder(Path(folder), given.get(key, names[0]), names) for key, names in SPLITS.items()]
            if not {'num_classes', 'class_map'} & given.keys():
                config['num_classes'] = _count_classes(train)
    return config


def _say_left_out(flag: str, items: Mapping[str, Any]) -> None:
    if items:
        scripts.say(f'leaves out of the recipe, for {flag} is given: {", ".join(f"{k}={v}" for k, v in items.items())}')


def _split_folder(root: Path, split: str, names: Sequence[str]) -> Path:
    """The folder of a split. Without one, timm would train and evaluate on the same images."""
    for name in (split, *(names if split in names else ())):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{root} needs folders 'train' and 'val', with a folder for each class in both.")


def _count_classes(root: Path) -> int:
    """The number of folders with images, which timm takes for classes."""
    classes = {
        Path(folder).name for folder, _, files in os.walk(root, followlinks=True)
        if any(file.lower().endswith(('.png', '.jpg', '.jpeg')) for file in files)}
    if not classes:
        raise FileNotFoundError(f'{root} has no folders with PNG or JPEG images, one for each class.')
    scripts.say(f'found {len(classes)} classes in {root}')
    return len(classes)


def _read(path: Path) -> Dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding='utf-8-sig'))
    except yaml.YAMLError as error:
        raise ValueError(f'{path} is no YAML file: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold names and values, such as epochs: 10.')
    return config
