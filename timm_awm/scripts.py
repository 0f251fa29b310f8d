"""Finds or downloads timm's train.py, validate.py and benchmark.py, which its wheel lacks, and runs them unmodified
with the plugin loaded.
"""
import difflib
import hashlib
import os
import shlex
import sys
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Sequence

import torch
import yaml

from .hub.run import TrainingRun

__all__ = ['find_recipe', 'find_script', 'recipes', 'run_train', 'run_with_plugin']

VERSION = '1.0.28'  # the newest tag of timm whose scripts timm_awm was tested with
DIGESTS = dict(  # SHA-256 of its scripts
    train='1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
    validate='1ff87867c808997ce443eb8ff8b2c7324519cdd0ec9dafbc3d5e666f89436749',
    benchmark='c2257b70ef9cd6e1dbc19a86cc5d0daea0505649a82352add58013d0382ed1ba',
)
URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{version}/{name}.py'
RUN_WITH_PLUGIN = (
    'import os, runpy, sys; del sys.argv[0]; sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0])); '
    'import timm_awm; runpy.run_path(sys.argv[0], run_name="__main__")')


def find_script(name: str, given: Optional[str] = None) -> Path:
    """A script of timm: as given, beside TIMM_TRAIN_SCRIPT, in the working directory, or downloaded to the cache.

    The cache, below `torch.hub.get_dir()`, holds what timm published under the tag `VERSION`.

    Args:
        name: 'train', 'validate' or 'benchmark'.
        given: A path that the user gave.

    Raises:
        FileNotFoundError: The given path, or that of TIMM_TRAIN_SCRIPT, does not exist.
        RuntimeError: The download failed, or is not what timm published.
    """
    train = os.environ.get('TIMM_TRAIN_SCRIPT')
    for source, named, script in (('--script', given, name), ('TIMM_TRAIN_SCRIPT', train, 'train')):
        if named and not Path(named).is_file():
            raise FileNotFoundError(
                f'{source} leads to {named!r}, which is no file; name {script}.py in a clone of timm.')
        if named and script == name:
            return Path(named)
    beside = [Path(train).with_name(f'{name}.py')] if train else []
    for path in (*beside, Path(f'{name}.py')):
        # the author of timm's scripts
        if path.is_file() and 'Ross Wightman' in path.read_text(encoding='utf-8', errors='replace'):
            return path
    return _cached_script(name)


def _cached_script(name: str) -> Path:
    installed = version('timm')
    if installed != VERSION:
        _say(f'takes {name}.py of timm {VERSION}, the newest that it was tested with, for timm {installed}')
    digest = DIGESTS[name]
    path = Path(torch.hub.get_dir(), 'timm_awm', VERSION, f'{name}.py')
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        url = URL.format(version=VERSION, name=name)
        _say(f'downloads {url}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError, HTTPException) as error:
            raise RuntimeError(
                f"Cannot get timm's {name}.py from {url}: {error}. Clone timm at the tag v{VERSION} and name the "
                'script with --script or TIMM_TRAIN_SCRIPT.') from error
    return path


def recipes() -> Dict[str, Path]:
    """The recipes of this package by name, such as 'cifar10/awm_resnet20_cifar'."""
    package = Path(__file__).parent
    folder = package / 'recipes'  # in a wheel
    if not folder.is_dir():
        folder = package.parent / 'recipes'
    return {path.relative_to(folder).with_suffix('').as_posix(): path for path in sorted(folder.rglob('*.yaml'))}


def find_recipe(name: str) -> Path:
    """A YAML file, or a recipe of this package by its name.

    Raises:
        FileNotFoundError: It is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    recipe = name.removesuffix('.yaml')
    if recipe not in known:
        hint = ''.join(f', the nearest is {near!r}' for near in difflib.get_close_matches(recipe, known, n=1))
        raise FileNotFoundError(f'{name!r} is neither a file nor a recipe{hint}; timm-awm recipes lists them all.')
    return known[recipe]


def run_train(
        script: Path,
        args: Sequence[str],
        config: Optional[str] = None,
        output: Optional[str] = None,
        experiment: Optional[str] = None,
        resume: Optional[str] = None,
        device_modules: Optional[Sequence[str]] = None,
) -> NoReturn:
    """Become timm's train.py with the plugin loaded.

    Args:
        script: timm's train.py.
        args: Its other arguments.
        config: A YAML file, or the name of a recipe.
        output: Folder for runs.
        experiment: Name of the run's folder in it.
        resume: A checkpoint, or 'auto' for the newest undamaged one in the run's folder, if any.
        device_modules: Modules to import besides the plugin.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: The YAML file is invalid; or 'auto' without an experiment or with --start-epoch.
    """
    defaults: Dict[str, Any] = {}
    command = [str(script)]
    if config is not None:
        path = find_recipe(config)
        defaults = _read_config(path)
        command += ['-c', str(path)]
    resume = defaults.get('resume') if resume is None else resume
    if resume == 'auto':
        name = experiment or defaults.get('experiment')
        if not name:
            raise ValueError('--resume auto needs --experiment NAME, for without it each start makes a new folder.')
        if any(arg.partition('=')[0] == '--start-epoch' for arg in args):
            raise ValueError('--resume auto takes the epoch from the checkpoint: leave --start-epoch out.')
        folder = Path(output or defaults.get('output') or 'output/train', str(name))
        checkpoint = TrainingRun(folder).last_checkpoint()
        _say(f'resumes from {checkpoint}' if checkpoint else 'has no checkpoint to resume from, starts the run')
        resume = str(checkpoint or '')
    for flag, value in (('--output', output), ('--experiment', experiment), ('--resume', resume)):
        command += [] if value is None else [flag, value]
    modules = device_modules or defaults.get('device_modules') or []
    end = args.index('--') if '--' in args else len(args)
    # last, as it takes all values that follow
    command += [*args[:end], '--device-modules', 'timm_awm', *(m for m in modules if m != 'timm_awm'), *args[end:]]
    _become(command)


def _read_config(path: Path) -> Dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding='utf-8'))
    except yaml.YAMLError as error:
        raise ValueError(f'{path} is no YAML file: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold names and values, such as epochs: 10.')
    return config


def run_with_plugin(script: Path, args: Sequence[str]) -> NoReturn:
    """Become a script of timm that has no `--device-modules`."""
    _become(['-c', RUN_WITH_PLUGIN, str(script), *args])


def _become(command: List[str]) -> NoReturn:
    """Replaces this process, so that the script gets its signals, exit status and place in torchrun."""
    _say('runs ' + shlex.join(command[2:] if command[0] == '-c' else command))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


def _say(text: str) -> None:
    if os.environ.get('RANK', '0') == '0':
        print(f'timm-awm {text}', file=sys.stderr, flush=True)
