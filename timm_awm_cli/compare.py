import argparse

from .main import new_path, positive_int

HELP = 'time models against their plain and SE controls, side by side (benchmark: one model, alone)'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times training steps (of an AWM model: jointly, and each phase by itself) and inference of a model against "
        "timm's own plain and SE models, in shuffled order in one process, so that noise hits all alike. Shows peak "
        "memory on accelerators. `timm-awm benchmark` runs timm's benchmark.py on one model.")
    parser.epilog = (
        'Example: timm-awm compare awm_resnet50 --amp-dtype bfloat16 -b 4 32 --csv results.csv\n'
        '         timm-awm compare resnet50 ecaresnet50d convnext_tiny --mode infer')
    parser.add_argument(
        'models', nargs='*', default=['awm_resnet20_cifar'], metavar='MODEL',
        help='models of timm. An awm_* model brings its plain and SE controls along; models named after it run with '
             'them. Without an awm_* model the first one is the base (default: awm_resnet20_cifar)')
    parser.add_argument(
        '--mode', choices=('train', 'infer', 'both'), default='both', help='what is timed (default: %(default)s)')
    parser.add_argument(
        '-b', '--batch-size', type=positive_int, nargs='+', default=(), metavar='N',
        help='images in a step, one or more sizes (default: 128 up to 64 px, else 16 in training and 8 in inference)')
    parser.add_argument('--img-size', type=positive_int, metavar='PX', help="side of the images (default: the base's)")
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='autocast (default: none, float32)')
    parser.add_argument('--compile', action='store_true', help='torch.compile all of them')
    parser.add_argument(
        '--channels-last', action=argparse.BooleanOptionalAction, default=True, help='memory format (default: yes)')
    parser.add_argument('--device', help='device to run on (default: an accelerator if there is one, else cpu)')
    parser.add_argument(
        '--repeats', type=positive_int, default=20, metavar='N', help='rounds timed (default: %(default)s)')
    parser.add_argument('--csv', type=new_path, metavar='FILE', help='new file for the results')


def run(args: argparse.Namespace) -> None:
    from timm_awm import compare
    settings = {k: v for k, v in vars(args).items() if k not in ('command', 'models', 'mode', 'batch_size')}
    modes = ('train', 'infer') if args.mode == 'both' else (args.mode,)
    compare.run(args.models, compare.Settings(modes=modes, batch_sizes=args.batch_size, **settings))
