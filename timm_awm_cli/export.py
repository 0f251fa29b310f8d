import argparse
from pathlib import Path
from typing import Tuple

from .main import new_path

HELP = "write a training run as a folder for the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a run of train.py as a folder in the Hub's format: weights, configuration, and a card with the results "
        'of exactly these weights.')
    parser.epilog = 'Example: timm-awm export output/train/RUN awm_resnet20_cifar.t3_c10 --checkpoint best'
    parser.add_argument('run', type=Path, metavar='RUN', help="the run's folder")
    parser.add_argument(
        'folder', type=new_path, metavar='FOLDER', help='new folder, with the name of the repository: MODEL.TAG')
    parser.add_argument(
        '--checkpoint', default='last', metavar='last|best|FILE', help='which weights (default: %(default)s)')
    parser.add_argument(
        '--ema', action=argparse.BooleanOptionalAction, default=True,
        help='take averaged weights (default: yes, if there are any)')
    parser.add_argument(
        '--license',
        help="licence of the weights (default: that of timm's weights that the run started from; apache-2.0 if it "
             'started from none)')
    parser.add_argument(
        '--label-names', type=Path, metavar='FILE',
        help='names of the classes, a line each (default: those of the data set, if it is at hand)')
    parser.add_argument(
        '--results', type=_split_and_file, nargs='+', default=(), metavar='SPLIT=FILE',
        help='what validate.py measured on a split, as it wrote it by --results-file')


def run(args: argparse.Namespace) -> None:
    from timm_awm import hub
    hub.export_run(
        args.run,
        args.folder,
        checkpoint=args.checkpoint,
        use_ema=args.ema,
        tag=args.folder.name.partition('.')[2] or None,
        license=args.license,
        label_names=args.label_names and args.label_names.read_text(encoding='utf-8-sig').splitlines(),
        results=dict(args.results),
    )
    print(f'{args.folder}: publish it with timm-awm push {args.folder} OWNER/{args.folder.resolve().name}')


def _split_and_file(text: str) -> Tuple[str, Path]:
    split, equals, file = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'must be SPLIT=FILE, got {text!r}')
    return split, Path(file)
