import argparse
import os
from pathlib import Path

from .main import positive_int

HELP = 'train, save, load and look into a small AWM model'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Trains a small AWM network on handwritten digits with alternating phases, saves it, loads it back and draws '
        'its mixing weights. Offline, one to two minutes on two cores.')
    parser.epilog = 'Example: timm-awm demo --output my-demo --epochs 24'
    parser.add_argument('--output', type=Path, default=Path('timm-awm-demo'), help='new folder (%(default)s)')
    parser.add_argument('--epochs', type=positive_int, default=12, help='passes over the data (%(default)s)')
    parser.add_argument('--period', type=int, default=2, help='epochs of a phase, 0 for joint training (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='random seed (%(default)s)')


def run(args: argparse.Namespace) -> None:
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # read with torch; else other work makes it ten times slower
    try:
        from timm_awm import demo
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the demo needs {error.name}: pip install ".[demo]", as the README says') from error
    demo.run(args.output, epochs=args.epochs, period=args.period, seed=args.seed)
