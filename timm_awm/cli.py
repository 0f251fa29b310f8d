"""The command `timm-awm`."""
import argparse
import contextlib
import fnmatch
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Tuple

import timm
import torch
from timm.utils import ParseKwargs
from torch.utils.flop_counter import FlopCounterMode

from . import __version__, bench, scripts
from .convert import GENERIC
from .layers import count_parameters

__all__ = ['main']


def main(args: Optional[List[str]] = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='timm-awm',
        description='Active weighted mapping (AWM) for timm.',
        epilog='Example: timm-awm demo',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='command', required=True)
    _add_demo(commands)
    _add_models(commands)
    _add_recipes(commands)
    _add_train(commands)
    _add_script(
        commands, 'validate', 'evaluates',
        'timm-awm validate --model awm_resnet20_cifar --checkpoint output/train/RUN/last.pth.tar --num-classes 10 '
        '--dataset hfds/uoft-cs/cifar10 --input-key img --target-key label --split test')
    _add_bench(commands)
    _add_script(commands, 'benchmark', 'times', 'timm-awm benchmark --model awm_resnet50 --bench train -b 64 --amp')
    _add_analyze(commands)
    _add_push(commands)
    _add_pull(commands)
    parsed, parsed_by_script = parser.parse_known_args(args)
    if 'script' in parsed:
        parsed.args = parsed_by_script[1:] if parsed_by_script[:1] == ['--'] else parsed_by_script
    elif parsed_by_script:
        parser.error(f'unrecognized arguments: {" ".join(parsed_by_script)}')
    signal.signal(signal.SIGTERM, _terminate)  # so that a command cleans up behind itself
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f'timm-awm: {error}', file=sys.stderr)
        return 1
    return 0


def _terminate(*_) -> NoReturn:
    sys.exit(143)


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        'demo',
        help='train, save, load and look into a small AWM model',
        description='Trains a small AWM network on handwritten digits with alternating phases, saves it, loads it back '
                    'and draws its mixing weights. Offline, about a minute on two cores.',
        epilog='Example: timm-awm demo --output my-demo --epochs 24',
    )
    parser.add_argument('--output', type=Path, default=Path('timm-awm-demo'), help='new folder (%(default)s)')
    parser.add_argument('--epochs', type=_positive_int, default=12, help='passes over the data (%(default)s)')
    parser.add_argument('--period', type=int, default=2, help='epochs of a phase, 0 for joint training (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='random seed (%(default)s)')
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the demo needs {error.name}: pip install ".[demo]", as the README says') from error
    demo.run(args.output, epochs=args.epochs, period=args.period, seed=args.seed)


def _add_models(commands) -> None:
    parser = commands.add_parser(
        'models',
        help='list the models',
        description='Lists the models as a Markdown table. MACs are those of the multiplications in convolutions and '
                    'matrices, for one image.',
        epilog="Example: timm-awm models '*_cifar'",
    )
    parser.add_argument('pattern', nargs='?', default='awm_*', help='wildcard for names (%(default)s)')
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> None:
    names = [name for name in timm.list_models(args.pattern) if name.startswith('awm_') and name != GENERIC]
    if not names:
        raise ValueError(f'No AWM model is called {args.pattern!r}; without a pattern all are listed.')
    print('| model | image | parameters | of them in merges | merges | GMACs |')
    print('| --- | --- | ---: | ---: | ---: | ---: |')
    for name in names:
        with torch.device('meta'):
            model = timm.create_model(name).eval()
            image = torch.empty(1, *model.pretrained_cfg['input_size'])
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(image)
        size = 'x'.join(map(str, image.shape[2:]))
        total, in_merges, merges = count_parameters(model)
        gmacs = counter.get_total_flops() / 2e9
        print(f'| {name} | {size} | {total:,} | {in_merges:,} | {merges} | {gmacs:.3g} |')


def _add_recipes(commands) -> None:
    parser = commands.add_parser(
        'recipes',
        help='list, show or copy recipes for training',
        description='Lists the recipes, shows one, or copies one to be changed.',
        epilog="Example: timm-awm recipes 'imagenet/*'; timm-awm recipes --show cifar10/awm_resnet20_cifar; "
               'timm-awm recipes --copy cifar10/awm_resnet20_cifar mine.yaml',
    )
    parser.add_argument('pattern', nargs='?', default='*', help='wildcard for names (%(default)s)')
    action = parser.add_mutually_exclusive_group()
    action.add_argument('--show', metavar='RECIPE', help='print a recipe')
    action.add_argument('--copy', metavar=('RECIPE', 'FILE'), nargs=2, help='copy a recipe to a new file')
    parser.set_defaults(run=_recipes)


def _recipes(args: argparse.Namespace) -> None:
    if args.show is not None:
        print(scripts.find_recipe(args.show).read_text(), end='')
    elif args.copy:
        name, goal = args.copy
        with scripts.find_recipe(name).open('rb') as source, open(goal, 'xb') as file:
            shutil.copyfileobj(source, file)
        print(f'{goal}: start it with timm-awm train -c {goal}')
    else:
        names = fnmatch.filter(scripts.recipes(), args.pattern)
        if not names:
            raise ValueError(f'No recipe is called {args.pattern!r}; without a pattern all are listed.')
        print('\n'.join(names))


def _add_train(commands) -> None:
    parser = _add_script_parser(
        commands, 'train', 'trains',
        'timm-awm train -c cifar10/awm_resnet20_cifar --epochs 24 --decay-milestones 11 18; with several processes: '
        'torchrun --nproc_per_node=2 -m timm_awm train -c ...')
    parser.add_argument('-c', '--config', metavar='FILE', help='a YAML file, or a recipe (timm-awm recipes)')
    parser.add_argument('--output', metavar='DIR', help='folder for runs (output/train)')
    parser.add_argument('--experiment', metavar='NAME', help="name of the run's folder in it")
    parser.add_argument(
        '--resume', metavar='FILE',
        help="a checkpoint, or 'auto' for the newest whole one of the experiment, if there is one: a run that was "
             'stopped anywhere goes on when the same command is given again')
    parser.add_argument('--device-modules', nargs='+', metavar='NAME', help='modules to import besides timm_awm')
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    scripts.run_train(
        scripts.find_script('train', args.script),
        args.args,
        config=args.config,
        output=args.output,
        experiment=args.experiment,
        resume=args.resume,
        device_modules=args.device_modules,
    )


def _add_bench(commands) -> None:
    parser = commands.add_parser(
        'bench',
        help='compare models with their plain and SE controls, side by side (benchmark: one model, alone)',
        description="Times training steps (of an AWM model: each phase by itself) and inference of a model against "
                    "timm's own plain and SE models, in turns in one process, and measures peak memory: ratios that "
                    "noise hits alike. `timm-awm benchmark` runs timm's benchmark.py on one model.",
        epilog='Example: timm-awm bench awm_resnet50 --amp-dtype bfloat16 --csv results.csv; '
               'timm-awm bench resnet50 ecaresnet50d convnext_tiny --mode infer',
    )
    parser.add_argument(
        'models', nargs='*', default=['awm_resnet20_cifar'], metavar='MODEL',
        help='any models of timm: an awm_* model brings its controls along, those named after it are compared with '
             'the same base, which is its plain control, or else the first one named (awm_resnet20_cifar)')
    parser.add_argument('--mode', choices=('train', 'infer', 'both'), default='both', help='(%(default)s)')
    parser.add_argument(
        '-b', '--batch-size', type=_positive_int, metavar='N',
        help='images in a step (128 up to 64 px, else 16 in training and 8 in inference)')
    parser.add_argument('--img-size', type=_positive_int, metavar='PX', help="the base model's own size if not given")
    parser.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), help='autocast (float32 if not given)')
    parser.add_argument('--compile', action='store_true', help='torch.compile all of them')
    parser.add_argument(
        '--channels-last', action=argparse.BooleanOptionalAction, default=True, help='memory format (channels last)')
    parser.add_argument('--device', help='(an accelerator if there is one, else cpu)')
    parser.add_argument('--warmup', type=_positive_int, default=3, metavar='N', help='steps not timed (%(default)s)')
    parser.add_argument('--repeats', type=_positive_int, default=20, metavar='N', help='rounds timed (%(default)s)')
    parser.add_argument('--csv', type=Path, metavar='FILE', help="new file for the results in timm's columns, and ours")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    bench.run(args.models, bench.Settings(
        modes=('train', 'infer') if args.mode == 'both' else (args.mode,),
        batch_size=args.batch_size,
        img_size=args.img_size,
        amp_dtype=args.amp_dtype,
        compile=args.compile,
        channels_last=args.channels_last,
        device=args.device,
        warmup=args.warmup,
        repeats=args.repeats,
        csv=args.csv,
    ))


def _add_analyze(commands) -> None:
    parser = commands.add_parser(
        'analyze',
        help='look at what the merges of trained models do with images',
        description='Infers λ of every merge for every image of a data set. Leaves λ over the depth and by class, the '
                    'images with the highest and the lowest sum of λ1 (ResNets), the share of the variance of λ that '
                    'lies between classes, the accuracy with merges set back to the identity, and with --train-split '
                    'what PCA and LDA tell of the class from λ and from pixels: summary.json, profile.csv and figures, '
                    'and in one folder for each model lambda.npz, classes.csv and figures.',
        epilog='Example: timm-awm analyze local-dir:awm_resnet20_cifar.t3_c10 --dataset hfds/uoft-cs/cifar10 '
               '--input-key img --target-key label --split test --train-split train; timm-awm analyze '
               'awm_resnet14_cifar awm_resnet20_cifar --checkpoint a/last.pth.tar b/last.pth.tar --data-dir images',
    )
    parser.add_argument(
        'models', nargs='+', metavar='MODEL', help='AWM models as timm names them, hf-hub:... and local-dir:... too')
    parser.add_argument(
        '--checkpoint', nargs='+', default=[], metavar='FILE',
        help="of train.py, one for each model (the models' own weights)")
    parser.add_argument('--num-classes', type=_positive_int, metavar='N', help="(the models' own)")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
    data = parser.add_argument_group("data, as for timm's validate.py; sizes and normalisation are the models' own")
    data.add_argument('--dataset', default='', metavar='TYPE/NAME', help='such as hfds/uoft-cs/cifar10 (image folders)')
    data.add_argument('--data-dir', metavar='DIR', help='root of the data set')
    data.add_argument('--split', default='validation', help='split to analyse (%(default)s)')
    data.add_argument('--train-split', metavar='SPLIT', help='split to fit PCA and LDA on (left out)')
    data.add_argument('--input-key', metavar='KEY', help='column of the images')
    data.add_argument('--target-key', metavar='KEY', help='column of the labels')
    data.add_argument('--num-images', type=_positive_int, metavar='N', help='of each split, drawn at random (all)')
    data.add_argument('-b', '--batch-size', type=_positive_int, default=256, metavar='N', help='(%(default)s)')
    data.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='processes that load (%(default)s)')
    parser.add_argument(
        '--ablation', action=argparse.BooleanOptionalAction, default=True,
        help='set back each merge in turn, and all: as many passes as merges, and two more (yes)')
    parser.add_argument('--device', help='(an accelerator if there is one, else cpu)')
    parser.add_argument(
        '--output', type=Path, default=Path('timm-awm-analysis'), metavar='FOLDER', help='new folder (%(default)s)')
    parser.set_defaults(run=_analyze)


def _analyze(args: argparse.Namespace) -> None:
    try:
        from . import analysis
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the analysis needs {error.name}: pip install ".[analysis]", as the README says') from error
    analysis.run(
        analysis.Settings(
            models=args.models,
            checkpoints=args.checkpoint,
            num_classes=args.num_classes,
            model_kwargs=args.model_kwargs,
            dataset=args.dataset,
            data_dir=args.data_dir,
            split=args.split,
            input_key=args.input_key,
            target_key=args.target_key,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
            train_split=args.train_split,
            num_images=args.num_images,
            ablation=args.ablation,
        ),
        args.output,
    )


def _add_push(commands) -> None:
    parser = commands.add_parser(
        'push',
        help='publish a trained model on the Hugging Face Hub',
        description='Publishes what train.py left of an AWM model, or a folder in the format of the Hub, in one '
                    'commit, and fetches it back to compare. A new repository is private. Your token: hf auth login.',
        epilog='Example: timm-awm push output/train/RUN me/awm_resnet20_cifar.t3_c10 --checkpoint best; without the '
               'Hub: timm-awm push output/train/RUN --dry-run --output awm_resnet20_cifar.t3_c10',
    )
    parser.add_argument(
        'source', type=Path, metavar='RUN_OR_FOLDER',
        help="a run's folder, or a Hub folder; with --all a folder of those")
    parser.add_argument(
        'repo_id', nargs='?', metavar='REPO_ID', help='OWNER/NAME, or NAME of yours; with --all: OWNER (you)')
    parser.add_argument('--all', action='store_true', help='publish all Hub folders in a folder, under their names')
    parser.add_argument('--dry-run', action='store_true', help='write the Hub folder and publish nothing')
    parser.add_argument('--output', type=Path, metavar='FOLDER', help='new Hub folder to keep (of a run; RUN/NAME)')
    of_run = parser.add_argument_group('of a run')
    of_run.add_argument(
        '--checkpoint', default='last', metavar='last|best|FILE', help='which weights (%(default)s)')
    of_run.add_argument(
        '--ema', action=argparse.BooleanOptionalAction, default=True, help='averaged weights, if there are such (yes)')
    of_run.add_argument('--tag', help='of the weights, such as t3_c10 (what follows the dot in NAME)')
    of_run.add_argument('--license', help='of the weights (apache-2.0, or that of the weights of timm it started from)')
    of_run.add_argument('--label-names', type=Path, metavar='FILE', help='names of the classes, a line each')
    of_run.add_argument(
        '--recipe', help='the recipe or YAML file that the run was started with (one of ours, if it is)')
    of_run.add_argument(
        '--dataset-id', metavar='ID', help="the data set's name on the Hub, if the run does not know it")
    of_run.add_argument(
        '--results', nargs='+', default=[], metavar='SPLIT=FILE', help='what validate.py wrote by --results-file')
    to_hub = parser.add_argument_group('to the Hub')
    to_hub.add_argument('--public', action='store_true', help='visibility of a new repository')
    to_hub.add_argument('--revision', metavar='BRANCH', help='branch to commit to, made if need be (main)')
    to_hub.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.set_defaults(run=_push)


# the options of push that are about a run, and what they are if not given
OF_RUN: Dict[str, Any] = dict(
    output=None, checkpoint='last', ema=True, tag=None, license=None, label_names=None, recipe=None, dataset_id=None,
    results=[])


def _push(args: argparse.Namespace) -> None:
    from . import hub
    if not (args.repo_id or args.all or args.dry_run):
        raise ValueError('Where to? Name a REPO_ID, or use --dry-run.')
    is_run = not args.all and not (args.source / 'config.json').is_file()
    if not is_run and any(getattr(args, name) != default for name, default in OF_RUN.items()):
        raise ValueError(
            f'{args.source} is no run, whose weights and facts can be chosen: leave out '
            + ', '.join(f'--{name.replace("_", "-")}' for name in OF_RUN) + '.')
    with contextlib.ExitStack() as stack:
        if args.all:
            owner = f'{args.repo_id}/' if args.repo_id else ''
            folders = {path.parent: owner + path.parent.name for path in sorted(args.source.glob('*/config.json'))}
            if not folders:
                raise ValueError(f'There is no Hub folder in {args.source}.')
        elif not is_run:
            folders = {args.source: args.repo_id}
        else:
            name = (args.repo_id or f'{args.source.resolve().name}-hub').rpartition('/')[2]
            if args.output or args.dry_run:
                folder = args.output or args.source / name
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), name)
            folders = {folder: args.repo_id}
            hub.export_run(
                args.source,
                folder,
                checkpoint=args.checkpoint,
                use_ema=args.ema,
                tag=args.tag or folder.name.partition('.')[2] or None,
                license=args.license,
                label_names=args.label_names and args.label_names.read_text(encoding='utf-8').splitlines(),
                recipe=args.recipe,
                data_id=args.dataset_id,
                results=dict(_split_and_file(text) for text in args.results),
            )
        for folder, repo_id in folders.items():
            if args.dry_run:
                hub.load_folder(folder)
                print(f'{folder}: can be published by timm-awm push {folder} OWNER/{folder.resolve().name}')
            else:
                url = hub.push(
                    folder, repo_id, private=not args.public, revision=args.revision, create_pr=args.create_pr)
                print(f'{folder}: published, fetched back and compared: {url}')


def _split_and_file(text: str) -> Tuple[str, Path]:
    split, equals, file = text.partition('=')
    if not equals:
        raise ValueError(f'--results takes SPLIT=FILE, such as test=results.json, not {text!r}.')
    return split, Path(file)


def _add_pull(commands) -> None:
    parser = commands.add_parser(
        'pull',
        help='fetch a model from the Hugging Face Hub and check it',
        description='Fetches an AWM model from the Hub, compares every file with its hash there, loads the model and '
                    'says what it is. With HF_HUB_OFFLINE=1 it is taken from the cache.',
        epilog='Example: timm-awm pull me/awm_resnet20_cifar.t3_c10 --output awm_resnet20_cifar.t3_c10',
    )
    parser.add_argument('repo_id', metavar='REPO_ID', help='OWNER/NAME')
    parser.add_argument('--output', type=Path, metavar='FOLDER', help="new folder (the Hub's cache)")
    parser.add_argument('--revision', help='branch, tag, commit or pull request (main)')
    parser.add_argument(
        '--allow-pickle', action='store_true',
        help='take weights in pickle form if there are no others, and write them as safetensors into --output')
    parser.set_defaults(run=_pull)


def _pull(args: argparse.Namespace) -> None:
    from . import hub
    pulled = hub.pull(args.repo_id, args.output, args.revision, args.allow_pickle)
    print(hub.describe(pulled.folder, pulled.model))
    compared = 'compared' if pulled.verified else 'not compared, for the Hub is not asked (HF_HUB_OFFLINE)'
    print(f'Commit {pulled.commit}, {compared} with its hashes on the Hub. Folder: {pulled.folder}')


def _add_script(commands, name: str, does: str, example: str) -> None:
    parser = _add_script_parser(commands, name, does, example)
    parser.set_defaults(
        run=lambda args: scripts.run_with_plugin(scripts.find_script(name, args.script), args.args))


def _add_script_parser(commands, name: str, does: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=f"run timm's own {name}.py",
        description=f"Finds timm's own {name}.py, unmodified, loads timm_awm into it and {does}. Without --script it "
                    f'is looked for beside TIMM_TRAIN_SCRIPT, in the working directory and in the cache, and else '
                    f'downloaded. All other arguments are those of {name}.py: timm-awm {name} -- --help shows them.',
        epilog=f'Example: {example}',
        allow_abbrev=False,
    )
    parser.add_argument('--script', metavar='FILE', help=f"timm's {name}.py")
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value
