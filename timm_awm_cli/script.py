"""The commands `validate` and `benchmark`: timm's own scripts with the plugin loaded."""
import argparse

HELP = "run timm's own {name}.py"
TAKES_REST = True
EXAMPLES = dict(
    validate='timm-awm validate --model awm_resnet20_cifar --checkpoint output/train/RUN/last.pth.tar --num-classes 10 '
             '--dataset hfds/uoft-cs/cifar10 --input-key img --target-key label --split test',
    benchmark='timm-awm benchmark --model awm_resnet50 --bench train -b 64 --amp',
    train='timm-awm train -c cifar10/awm_resnet20_cifar --epochs 24 --decay-milestones 11 18; with several processes: '
          'torchrun --nproc_per_node=2 -m timm_awm train -c ...')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = parser.prog.split()[-1]
    parser.description = (
        f"Finds timm's own {name}.py, unmodified, loads timm_awm into it and runs it. Without --script it is looked for "
        'beside TIMM_TRAIN_SCRIPT, in the working directory and in the cache, and else downloaded. All other arguments '
        f'are those of {name}.py: timm-awm {name} -- --help shows them.')
    parser.epilog = f'Example: {EXAMPLES[name]}'
    parser.add_argument('--script', metavar='FILE', help=f"timm's {name}.py")


def run(args: argparse.Namespace) -> None:
    from timm_awm import scripts
    scripts.run_with_plugin(scripts.find_script(args.command, args.script), args.rest)
