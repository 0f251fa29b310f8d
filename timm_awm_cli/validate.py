"""`timm-awm validate` and `timm-awm benchmark`: timm's own scripts with the models of timm_awm."""
from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any, Dict, Sequence

from . import scripts

TAKES_REST = True

HELP = "run timm's own {name}.py"
EXAMPLES = {
    'validate': 'timm-awm validate --model awm_resnet20_cifar --checkpoint output/train/RUN/last.pth.tar '
                '--num-classes 10 --dataset hfds/uoft-cs/cifar10 --input-key img --target-key label --split test',
    'benchmark': 'timm-awm benchmark --model awm_resnet50 --bench train -b 64 --amp',
}
RUN_WITH_PLUGIN = (
    'import os, runpy, sys; del sys.argv[0]; sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0])); '
    'import timm_awm; runpy.run_path(sys.argv[0], run_name="__main__")')


def add_arguments(parser: ArgumentParser) -> None:
    name = parser.prog.split()[-1]  # one module for two commands
    describe(parser, name, EXAMPLES[name])


def describe(parser: ArgumentParser, name: str, example: str) -> None:
    parser.description = (
        f"Runs timm's own {name}.py, unmodified, with timm_awm loaded, and on the CPU if there is no GPU. All other "
        f'arguments are those of {name}.py.')
    parser.epilog = f'Example: {example}\nAll arguments: timm-awm {name} -- --help'
    parser.add_argument(
        '--script', metavar='FILE',
        help=f"timm's {name}.py or its folder (default: TIMM_TRAIN_SCRIPT, else downloaded once)")


def given_flags(args: Sequence[str], *dicts: str) -> Dict[str, Any]:
    """The flags among a script's arguments that decide what is added to them, and those that take NAME=VALUE."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for name in 'dataset', 'data-dir', 'train-split', 'val-split', 'class-map', 'num-classes', 'device', 'start-epoch':
        parser.add_argument(f'--{name}')
    parser.add_argument('-j', '--workers')
    for name in dicts:
        parser.add_argument(f'--{name.replace("_", "-")}', nargs='*')
    return vars(parser.parse_known_args(args)[0])


def run(args: Namespace) -> None:
    script = scripts.find_script(args.command, args.script)
    flags = scripts.device_flags(given_flags(args.rest))
    if args.command == 'benchmark':
        del flags[2:]  # it loads no data
    scripts.become(['-c', RUN_WITH_PLUGIN, str(script), *flags, *args.rest])  # they have no --device-modules
