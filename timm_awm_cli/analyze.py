import argparse
import os

from .main import new_path, positive_int

HELP = 'look at what the merges of trained models do with images'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Infers lambda of every merge for every image of a data set, and leaves arrays, JSON and figures: lambda over '
        'the depth and by class, the images with the highest and the lowest sum of lambda1 (ResNets), the accuracy '
        'with merges set back to the identity, and what PCA and LDA tell of the class (with --train-split).')
    parser.epilog = (
        'Example: timm-awm analyze hub/awm_resnet14_cifar.t3_c10 --dataset hfds/uoft-cs/cifar10 --input-key img '
        '--target-key label --split test --train-split train')
    parser.add_argument(
        'models', nargs='+', metavar='MODEL',
        help="timm model name, hf-hub:OWNER/NAME[@REVISION], local-dir:FOLDER, a Hub folder, or a run of train.py")
    data = parser.add_argument_group("data, as for timm's validate.py; sizes and normalisation are the models' own")
    data.add_argument(
        '--dataset', default='', metavar='TYPE/NAME', help='such as hfds/uoft-cs/cifar10 (default: image folders)')
    data.add_argument('--data-dir', metavar='DIR', help='root of the data set')
    data.add_argument('--split', default='validation', help='split to analyse (default: %(default)s)')
    data.add_argument('--train-split', metavar='SPLIT', help='split to fit PCA and LDA on (default: leave both out)')
    data.add_argument('--input-key', metavar='KEY', help='column of the images (default: image)')
    data.add_argument('--target-key', metavar='KEY', help='column of the labels (default: label)')
    data.add_argument(
        '--num-images', type=positive_int, metavar='N', help='images of each split, drawn at random (default: all)')
    data.add_argument(
        '-b', '--batch-size', type=positive_int, default=256, metavar='N', help='images at once (default: %(default)s)')
    data.add_argument(
        '-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load images (default: as many as cores, at most 4)')
    parser.add_argument(
        '--ablation', action=argparse.BooleanOptionalAction, default=True,
        help='measure the accuracy with each merge, then all, at equal weights: the data are read once, the network '
             'runs once for each merge and three times more (default: yes)')
    parser.add_argument('--device', help='device to run on (default: an accelerator if there is one, else cpu)')
    parser.add_argument(
        '--output', type=new_path, default='timm-awm-analysis', metavar='FOLDER',
        help='new folder (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    if not args.dataset and not (args.data_dir and os.path.exists(args.data_dir)):
        where = f'There is no folder {args.data_dir}' if args.data_dir else 'No data are named'
        raise FileNotFoundError(f'{where}: give --data-dir FOLDER, or --dataset hfds/OWNER/NAME.')
    from timm_awm import analysis
    analysis.analyze(**{key: value for key, value in vars(args).items() if key != 'command'})
