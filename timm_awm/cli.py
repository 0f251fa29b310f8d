"""The command `timm-awm`."""
import argparse
import signal
import sys
from pathlib import Path
from typing import List, NoReturn, Optional

import timm
import torch

from . import __version__
from .layers import MixingWeights

__all__ = ['main']


def main(args: Optional[List[str]] = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='timm-awm',
        description='Active weighted mapping (AWM) for timm.',
        epilog='Example: timm-awm demo',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='command', required=True)
    _add_demo(commands)
    _add_models(commands)
    parsed = parser.parse_args(args)
    signal.signal(signal.SIGTERM, _terminate)  # so that a command cleans up behind itself
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f'timm-awm: {error}', file=sys.stderr)
        return 1
    return 0


def _terminate(*_) -> NoReturn:
    sys.exit(143)


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        'demo',
        help='train, save, load and look into a small AWM model',
        description='Trains a small AWM network on handwritten digits with alternating phases, saves it, loads it back '
                    'and draws its mixing weights. Offline, about a minute on two cores.',
        epilog='Example: timm-awm demo --output my-demo --epochs 24',
    )
    parser.add_argument('--output', type=Path, default=Path('timm-awm-demo'), help='new folder (%(default)s)')
    parser.add_argument('--epochs', type=_positive_int, default=12, help='passes over the data (%(default)s)')
    parser.add_argument('--period', type=int, default=2, help='epochs of a phase, 0 for joint training (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='random seed (%(default)s)')
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the demo needs {error.name}: pip install ".[demo]", as the README says') from error
    demo.run(args.output, epochs=args.epochs, period=args.period, seed=args.seed)


def _add_models(commands) -> None:
    parser = commands.add_parser(
        'models',
        help='list the models',
        description='Lists the models as a Markdown table.',
        epilog="Example: timm-awm models '*_cifar'",
    )
    parser.add_argument('pattern', nargs='?', default='awm_*', help='wildcard for names (%(default)s)')
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> None:
    names = [name for name in timm.list_models(args.pattern) if name.startswith('awm_')]
    if not names:
        raise ValueError(f'No AWM model is called {args.pattern!r}; without a pattern all are listed.')
    print('| model | image | parameters | of them in merges | merges |')
    print('| --- | --- | ---: | ---: | ---: |')
    for name in names:
        with torch.device('meta'):
            model = timm.create_model(name)
        merges = [m for m in model.modules() if isinstance(m, MixingWeights)]
        size = 'x'.join(map(str, model.pretrained_cfg['input_size'][1:]))
        total = sum(p.numel() for p in model.parameters())
        in_merges = sum(p.numel() for m in merges for p in m.parameters())
        print(f'| {name} | {size} | {total:,} | {in_merges:,} | {len(merges)} |')


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value
