"""Finds or downloads timm's train.py, validate.py and benchmark.py, which its wheel lacks, and becomes one of them.
Finds recipes and checkpoints. Imports no torch.
"""
import difflib
import hashlib
import os
import shlex
import shutil
import sys
import zipfile
import zlib
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence
from urllib.request import urlopen

VERSION = '1.0.28'  # the newest tag of timm whose scripts timm_awm was tested with
DIGESTS = dict(  # SHA-256 of its scripts
    train='1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
    validate='1ff87867c808997ce443eb8ff8b2c7324519cdd0ec9dafbc3d5e666f89436749',
    benchmark='c2257b70ef9cd6e1dbc19a86cc5d0daea0505649a82352add58013d0382ed1ba',
)
URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{version}/{name}.py'


def find_script(name: str, given: Optional[str] = None) -> Path:
    """A script of timm ('train', 'validate' or 'benchmark'): as given, TIMM_TRAIN_SCRIPT or beside it, or downloaded to
    `timm_awm` in XDG_CACHE_HOME (default: ~/.cache).

    Raises:
        FileNotFoundError: The given path, or that of TIMM_TRAIN_SCRIPT, does not exist.
        RuntimeError: The download failed, or is not what timm published.
    """
    source = '--script' if given else 'TIMM_TRAIN_SCRIPT'
    if named := given or os.environ.get(source):
        path = Path(named)
        if path.is_dir():
            path /= f'{name}.py'
        elif not given and name != 'train':
            path = path.with_name(f'{name}.py')
        if path.is_file():
            return path
        if given or name == 'train':
            raise FileNotFoundError(
                f'{source} leads to {str(path)!r}, which is no file; name {name}.py in a clone of timm, or the clone.')
    installed = version('timm')
    if installed != VERSION:
        say(f'takes {name}.py of timm {VERSION}, the newest that it was tested with, for timm {installed}')
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    path = cache / 'timm_awm' / VERSION / f'{name}.py'
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != DIGESTS[name]:
        url = URL.format(version=VERSION, name=name)
        say(f'downloads {url}')
        try:
            with urlopen(url, timeout=60) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != DIGESTS[name]:
                raise RuntimeError('its hash is not that of what timm published')
        except (OSError, RuntimeError, HTTPException) as error:
            raise RuntimeError(
                f"Cannot get timm's {name}.py from {url}: {error}. Clone timm at the tag v{VERSION} and name the "
                'script with --script or TIMM_TRAIN_SCRIPT.') from error
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f'.{os.getpid()}')  # each process of torchrun may download it
        partial.write_bytes(content)
        partial.replace(path)
    return path


def recipes() -> Dict[str, Path]:
    """The recipes of this package by name, such as 'cifar10/awm_resnet20_cifar'."""
    root = Path(__file__).parents[1]
    folder = root / 'timm_awm' / 'recipes'  # in a wheel
    if not folder.is_dir():
        folder = root / 'recipes'
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


def last_checkpoint(folder: Path) -> Optional[Path]:
    """The newest whole checkpoint of an epoch's end in a run's folder, or None.

    A run that was killed may leave a checkpoint half-written, or the newest one only as `tmp.pth.tar`, which timm
    renames to `last.pth.tar`. Recovery checkpoints are not taken: train.py would leave out the rest of their epoch.

    Raises:
        ValueError: All checkpoints are damaged.
    """
    numbered = [path for path in folder.glob('checkpoint-*.pth.tar') if path.name[11:-8].isdecimal()]
    kept = [*folder.glob('last.pth.tar'), *sorted(numbered, key=lambda path: -int(path.name[11:-8]))]
    for path in (*folder.glob('tmp.pth.tar'), *kept):
        try:
            with zipfile.ZipFile(path) as file:
                if file.testzip() is None:
                    return path
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError):
            pass  # damaged
    if kept:
        raise ValueError(f'Every checkpoint in {str(folder)!r} is damaged: move it away to start again.')
    return None


def device_flags(given: Mapping[str, Any]) -> List[str]:
    """Flags to add to the given ones where there is no GPU: the default device of timm's scripts is cuda."""
    drivers = '/dev/nvidiactl', '/dev/kfd', '/dev/dxg'  # NVIDIA, AMD, Windows Subsystem for Linux
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1') or '+cpu' in version('torch')
    if 'device' in given or not hidden and (any(map(os.path.exists, drivers)) or shutil.which('nvidia-smi')):
        return []
    workers = max(1, min(4, (os.cpu_count() or 1) // 4))  # most cores are for the network
    say('found no GPU and runs on the CPU; --device names another device')
    return ['--device', 'cpu', *([] if 'workers' in given else ['-j', str(workers)])]


def become(command: Sequence[str]) -> NoReturn:
    """Replaces this process by `python *command`, so that it gets the signals, exit status and place in torchrun."""
    say('runs ' + shlex.join(command[2:] if command[0] == '-c' else command))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


def say(text: str) -> None:
    """A line on stderr, from the first of the processes that torchrun starts."""
    if os.environ.get('RANK', '0') == '0':
        print(f'timm-awm {text}', file=sys.stderr, flush=True)
