"""`timm-awm validate` and `timm-awm benchmark`: timm's own scripts with the models of timm_awm."""
from argparse import ArgumentParser, Namespace

TAKES_REST = True

HELP = "run timm's own {name}.py"
EXAMPLES = {
    'validate': 'timm-awm validate --model awm_resnet20_cifar --checkpoint output/train/RUN/last.pth.tar '
                '--num-classes 10 --dataset hfds/uoft-cs/cifar10 --input-key img --target-key label --split test',
    'benchmark': 'timm-awm benchmark --model awm_resnet50 --bench train -b 64 --amp',
}


def add_arguments(parser: ArgumentParser) -> None:
    name = parser.prog.split()[-1]  # one module for two commands
    describe(parser, name, EXAMPLES[name])


def describe(parser: ArgumentParser, name: str, example: str) -> None:
    parser.description = (
        f"Runs timm's own {name}.py, unmodified, with timm_awm loaded. Without --script it is taken from the folder of "
        'TIMM_TRAIN_SCRIPT, the working directory or the cache, or downloaded. All other arguments are those of '
        f'{name}.py: timm-awm {name} -- --help shows them.')
    parser.epilog = f'Example: {example}'
    parser.add_argument('--script', metavar='FILE', help=f"timm's {name}.py")


def run(args: Namespace) -> None:
    from timm_awm import scripts
    scripts.run_with_plugin(scripts.find_script(args.command, args.script), args.rest)
