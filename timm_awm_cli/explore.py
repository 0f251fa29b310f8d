import argparse

from .main import positive_int

HELP = 'a page in the browser: which paths do networks take for a picture?'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Serves a page on this machine. Drop a picture there: it shows the classes and lambda of every merge, beside '
        'what timm-awm analyze found over a data set, and what changed merges do to the prediction. Uploads are '
        'deleted after some minutes, and all of them at the end.')
    parser.epilog = 'Example: timm-awm explore hub/awm_resnet14_cifar.t3_c10 hub/awm_resnet14_cifar.plain_c10'
    parser.add_argument(
        'models', nargs='+', metavar='MODEL',
        help="timm model name, hf-hub:OWNER/NAME[@REVISION], local-dir:FOLDER, a Hub folder, or a run of train.py")
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 lets others in (default: %(default)s)')
    parser.add_argument(
        '--port', type=positive_int, metavar='N', help='port to listen on (default: the first free one from 7860)')


def run(args: argparse.Namespace) -> None:
    from timm_awm.explore import explore
    explore(args.models, args.host, args.port)
