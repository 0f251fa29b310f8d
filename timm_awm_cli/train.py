"""`timm-awm train`: timm's own train.py with timm_awm loaded."""
from argparse import ArgumentParser, Namespace

from .script import describe

TAKES_REST = True

HELP = "run timm's own train.py"


def add_arguments(parser: ArgumentParser) -> None:
    describe(
        parser, 'train',
        'timm-awm train -c cifar10/awm_resnet20_cifar --epochs 24 --decay-milestones 11 18; with several processes: '
        'torchrun --nproc_per_node=2 -m timm_awm train -c ...')
    parser.add_argument('-c', '--config', metavar='FILE', help='a YAML file, or a recipe (timm-awm recipes)')
    parser.add_argument('--output', metavar='DIR', help='folder for runs (output/train)')
    parser.add_argument('--experiment', metavar='NAME', help="name of the run's folder in it")
    parser.add_argument(
        '--resume', metavar='FILE',
        help="a checkpoint, or 'auto' for the newest undamaged one of the experiment, if any: the same command then "
             'starts a run and continues it')
    parser.add_argument('--device-modules', nargs='+', metavar='NAME', help='modules to import besides timm_awm')


def run(args: Namespace) -> None:
    from timm_awm import scripts
    scripts.run_train(
        scripts.find_script('train', args.script),
        args.rest,
        config=args.config,
        output=args.output,
        experiment=args.experiment,
        resume=args.resume,
        device_modules=args.device_modules,
    )
