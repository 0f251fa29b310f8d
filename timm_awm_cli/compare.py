import argparse
from pathlib import Path

from .main import positive_int

HELP = 'time models against their plain and SE controls, side by side (benchmark: one model, alone)'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times training steps (of an AWM model: each phase by itself) and inference of a model against timm's own "
        'plain and SE models, in turns in one process, and measures peak memory: ratios that noise hits alike. '
        "`timm-awm benchmark` runs timm's benchmark.py on one model.")
    parser.epilog = (
        'Example: timm-awm compare awm_resnet50 --amp-dtype bfloat16 --csv results.csv; '
        'timm-awm compare resnet50 ecaresnet50d convnext_tiny --mode infer')
    parser.add_argument(
        'models', nargs='*', default=['awm_resnet20_cifar'], metavar='MODEL',
        help='any models of timm: an awm_* model brings its controls along, those named after it are compared with '
             'the same base, which is its plain control, or else the first one named (awm_resnet20_cifar)')
    parser.add_argument('--mode', choices=('train', 'infer', 'both'), default='both', help='(%(default)s)')
    parser.add_argument(
        '-b', '--batch-size', type=positive_int, metavar='N',
        help='images in a step (128 up to 64 px, else 16 in training and 8 in inference)')
    parser.add_argument('--img-size', type=positive_int, metavar='PX', help="the base model's own size if not given")
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='autocast (float32 if not given)')
    parser.add_argument('--compile', action='store_true', help='torch.compile all of them')
    parser.add_argument(
        '--channels-last', action=argparse.BooleanOptionalAction, default=True, help='memory format (channels last)')
    parser.add_argument('--device', help='(an accelerator if there is one, else cpu)')
    parser.add_argument('--warmup', type=positive_int, default=3, metavar='N', help='steps not timed (%(default)s)')
    parser.add_argument('--repeats', type=positive_int, default=20, metavar='N', help='rounds timed (%(default)s)')
    parser.add_argument('--csv', type=Path, metavar='FILE', help="new file for the results in timm's columns, and ours")


def run(args: argparse.Namespace) -> None:
    from timm_awm import compare
    settings = {k: v for k, v in vars(args).items() if k not in ('command', 'models', 'mode')}
    modes = ('train', 'infer') if args.mode == 'both' else (args.mode,)
    compare.run(args.models, compare.Settings(modes=modes, **settings))
