import argparse

from .main import new_path, positive_int

HELP = 'train, save, load and look into a small AWM model'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Trains a small AWM network on handwritten digits with alternating phases, saves it, loads it back and draws '
        'its mixing weights. Offline, in minutes on a CPU.')
    parser.epilog = 'Example: timm-awm demo --output my-demo --epochs 24'
    parser.add_argument(
        '--output', type=new_path, default='timm-awm-demo', metavar='FOLDER', help='new folder (default: %(default)s)')
    parser.add_argument('--epochs', type=positive_int, default=12, help='number of epochs (default: %(default)s)')
    parser.add_argument(
        '--period', type=int, default=2, help='epochs of a phase, 0 for joint training (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    from timm_awm import demo
    demo.run(args.output, epochs=args.epochs, period=args.period)
