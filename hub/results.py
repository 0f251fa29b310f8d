"""The runs that the results rest on, and the tables of them.

    python hub/results.py run NAME -c RECIPE --seed 0 ...   trains with timm's train.py (goes on with a run that was
                                                            stopped), tests once, keeps the run in hub/results/
    python hub/results.py keep FOLDER                       keeps a run that is trained and tested
    python hub/results.py                                   writes results/results.csv and the tables of the READMEs
"""
import argparse
import csv
import io
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from scipy.stats import ttest_rel

from timm_awm.hub.training_run import TrainingRun, data_name
from timm_awm_cli import scripts

HUB = Path(__file__).parent
RUNS = HUB / 'results'
OUTPUT = HUB.parent / 'output' / 'train'  # of train.py
CSV = RUNS / 'results.csv'
BENCHMARK = HUB / 'benchmark-cpu-bfloat16.csv'  # as the runs were trained
COMPARED = {'plain': ' awm=False', 'joint': '', 'SE': ' awm=False attn_layer=se'}  # as timm-awm compare names them
# arguments that say where a run was made, and nothing about its result
MACHINE = {
    'dataset', 'data_dir', 'device', 'device_modules', 'experiment', 'no_prefetcher', 'output', 'pin_mem', 'resume',
    'workers'}
# the paper's test errors in %, by the authors' code the best epoch of 700 (plain: 165), beside runs as long or in
# proportion
PAPER = {
    ('cifar10', 'awm_resnet14_cifar', 'plain', 14): '9.21', ('cifar10', 'awm_resnet14_cifar', 'plain', 165): '9.21',
    ('cifar10', 'awm_resnet14_cifar', 't = 3', 60): '8.13', ('cifar10', 'awm_resnet14_cifar', 't = 3', 700): '8.13',
    ('cifar100', 'awm_resnet14_cifar', 't = 3', 60): '31.77'}
NETWORKS = dict(
    awm_resnet14_cifar='ResNet-14', awm_resnet20_cifar='ResNet-20', awm_densenet22_cifar='DenseNet-22')
DATA = dict(cifar10='CIFAR-10', cifar100='CIFAR-100')


def run(name: str, flags: List[str]) -> None:
    """Trains, reads the test set, and keeps the run."""
    if (RUNS / name).exists():
        sys.exit(f'There is a run {RUNS / name} already: give another name, or delete that to make it anew.')
    folder = OUTPUT / name
    awm = [sys.executable, '-m', 'timm_awm']
    commit = git('rev-parse', '--short', 'HEAD')
    if git('status', '--porcelain', '--', 'timm_awm*', 'recipes'):  # results of other runs change nothing
        commit += '-dirty'
    origin = folder / 'origin.json'
    before = json.loads(origin.read_text(encoding='utf-8'))['minutes'] if origin.is_file() else 0
    start = time.monotonic()
    try:
        subprocess.run(
            [*awm, 'train', '--output', OUTPUT, '--experiment', name, '--resume', 'auto', *flags], check=True)
    finally:  # what a run took that was stopped counts too
        if folder.is_dir():
            given = [flag[2:].partition('=')[0].replace('-', '_') for flag in flags if flag.startswith('--')]
            minutes = before + round((time.monotonic() - start) / 60)
            origin.write_text(json.dumps(dict(minutes=minutes, commit=commit, flags=given)), encoding='utf-8')
    args = TrainingRun(folder).args
    options = {
        '--model': args['model'], '--checkpoint': folder / 'last.pth.tar', '--num-classes': args['num_classes'],
        '--dataset': args['dataset'], '--data-dir': args['data_dir'], '--split': 'test',
        '--input-key': args['input_key'], '--target-key': args['target_key'], '--device': args['device'],
        '--results-file': folder / 'test.json', '--results-format': 'json'}
    lists = {'--mean': args['mean'], '--std': args['std'],
             '--model-kwargs': [f'{key}={value}' for key, value in args['model_kwargs'].items()]}
    subprocess.run(
        [*awm, 'validate', *(str(part) for flag in options.items() if flag[1] is not None for part in flag),
         *(str(part) for flag, values in lists.items() if values for part in (flag, *values))], check=True)
    keep(folder)


def git(*args: str) -> str:
    return subprocess.run(['git', *args], cwd=HUB.parent, check=True, text=True, capture_output=True).stdout.strip()


def read_yaml(path: Path) -> Dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def keep(folder: Path) -> None:
    """Copies what is left of a finished run: its recipe and what differs from it, versions, every epoch, the test."""
    trained = TrainingRun(folder)
    origin = json.loads((folder / 'origin.json').read_text(encoding='utf-8'))
    different = {
        path: [key for key, value in read_yaml(path).items() if trained.args.get(key) != value]
        for path in scripts.recipes().values()}
    recipe = min(different, key=lambda path: len(different[path]))
    keys = {*different[recipe], *origin.pop('flags', ()), 'seed'} & trained.args.keys() - MACHINE
    record = {
        'recipe': f'{recipe.parent.name}/{recipe.stem}',
        'data': data_name(trained.args)[0].rpartition('/')[2],
        'overrides': {key: trained.args[key] for key in sorted(keys)},
        **origin,
        'versions': {name: version(name) for name in ('timm', 'torch')} | {'python': platform.python_version()},
    }
    goal = RUNS / folder.name
    goal.mkdir(parents=True)
    (goal / 'run.json').write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
    for name in ('summary.csv', 'test.json'):
        shutil.copyfile(folder / name, goal / name)


def setting(args: Dict[str, Any]) -> str:
    """Names the kind of a network and of its training: plain, SE, joint, or the periods of the alternation."""
    options = dict(args['opt_kwargs'])
    if args['opt'] != 'alternating':
        return 'SE' if 'block_args' in args['model_kwargs'] else 'plain'
    period, merge_period = options.get('period', 3), options.get('merge_period')
    how = f't = {period}' + (f' and {merge_period}' if merge_period else '') if period else 'joint'
    changed = {key: value for key, value in options.items() if key in ('merge_lr_scale', 'merge_weight_decay')}
    return ', '.join([how, *(f'`{key}={value}`' for key, value in changed.items())])


def row(folder: Path) -> Dict[str, Any]:
    """A line of the CSV: timm's columns, then ours."""
    record = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
    args = {**read_yaml(scripts.find_recipe(record['recipe'])), **record['overrides']}
    test = json.loads((folder / 'test.json').read_text(encoding='utf-8'))
    summary = TrainingRun(folder).summary
    evaluated = {epoch: float(line['eval_top1']) for epoch, line in summary.items()}
    epochs = args['epochs']
    assert sorted(evaluated) == list(range(epochs)), f'{folder} is not finished'
    best = max(evaluated, key=lambda epoch: (evaluated[epoch], -epoch))
    phases = [line.get('train_phase', 'backbone') for line in summary.values()]  # plain networks have no phases
    start, images = args.get('pretrained_path'), re.search(r'\[:(\d+)\]', args['train_split'])
    return {
        'data': record['data'],
        'model': args['model'],
        **{name: test[name] for name in (
            'img_size', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'crop_pct', 'interpolation')},
        'setting': setting(args),
        'start': Path(start).parent.name if start else '',
        'images': int(images[1]) if images else 50000,
        'epochs': epochs,
        'backbone_epochs': epochs - phases.count('merge'),
        'seed': args['seed'],
        'eval_split': args['val_split'],
        'eval_top1': evaluated[epochs - 1],
        'best_eval_top1': evaluated[best],
        'best_epoch': best,
        'minutes': record['minutes'],
        'commit': record['commit'],
        'recipe': record['recipe'],
        'run': folder.name,
    }


def rows() -> List[Dict[str, Any]]:
    return [row(path.parent) for path in sorted(RUNS.glob('*/run.json'))]


Task = Tuple[str, str, str, int, int]  # data, model, start, images, epochs
Group = Dict[int, Dict[str, Any]]  # runs by their seed


def group(rows: List[Dict[str, Any]]) -> Dict[Task, Dict[str, Group]]:
    """Runs by what was trained on what, kind and seed; long ones first, plain before the others.

    Raises:
        ValueError: Two runs have the same seed.
    """
    def order(r: Dict[str, Any]) -> Any:
        t = re.search(r't = (\d+)', r['setting'])  # 12 behind 3
        return (
            r['data'], r['model'], r['start'], -r['epochs'], r['images'], r['setting'] != 'plain',
            int(t[1]) if t else 0, r['setting'], r['seed'])

    tasks: Dict[Task, Dict[str, Group]] = {}
    for r in sorted(rows, key=order):
        task = r['data'], r['model'], r['start'], r['images'], r['epochs']
        runs = tasks.setdefault(task, {}).setdefault(r['setting'], {})
        if r['seed'] in runs:
            raise ValueError(
                f'{runs[r["seed"]]["run"]} and {r["run"]} have the same seed: one run twice is no evidence.')
        runs[r['seed']] = r
    return tasks


def difference(runs: Group, control: Group) -> str:
    """The mean difference of the test error from the control, paired by seed, and its 95 % interval (Student's t)."""
    seeds = sorted(runs.keys() & control.keys())
    if not seeds:
        return ''
    own, plain = ([of[seed]['top1_err'] for seed in seeds] for of in (runs, control))
    text = f'{statistics.mean(own) - statistics.mean(plain):+.2f}'
    if len(seeds) > 1:
        low, high = ttest_rel(own, plain).confidence_interval()
        text += f' ({low:+.2f} to {high:+.2f})'
    return text


def mean_and_spread(values: List[float]) -> str:
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}' if values else ''


def errors(runs: Optional[Group]) -> str:
    return mean_and_spread([r['top1_err'] for r in runs.values()]) if runs else ''


def lines(head: str, cells: List[Any], left: int) -> str:
    """A Markdown table whose first columns, as many as `left`, are flush left."""
    count = head.count('|') - 1
    rule = f'| {" | ".join(["---"] * left + ["---:"] * (count - left))} |'
    return '\n'.join([head, rule, *(f'| {" | ".join(map(str, line))} |' for line in cells)])


def table(rows: List[Dict[str, Any]]) -> str:
    """The table of hub/README.md: every kind of run."""
    cells = []
    for (data, model, start, images, epochs), kinds in group(rows).items():
        for kind, runs in kinds.items():
            if '`' in kind:  # options that are gone
                continue
            first = next(iter(runs.values()))
            held_out = [100 - r['eval_top1'] for r in runs.values() if r['eval_split'] != 'test']
            cells.append((
                DATA[data], NETWORKS[model] + (', fine-tuned' if start else ''), kind, f'{images:,}',
                epochs, first['backbone_epochs'], len(runs), mean_and_spread(held_out), errors(runs),
                difference(runs, kinds.get('plain', {})) if kind != 'plain' else '',
                PAPER.get((data, model, kind, epochs), '')))
    return lines(
        '| data | network | trained | images | epochs | of the backbone | n | held-out error, % | test error, % | '
        'difference from plain | paper, % |', cells, 3)


def summary(rows: List[Dict[str, Any]]) -> str:
    """The table of README.md: joint AWM, and SE where it was trained, against the plain network."""
    cells, with_se = [], any(r['setting'] == 'SE' for r in rows)
    for (data, model, start, images, epochs), kinds in group(rows).items():
        plain, joint, se = (kinds.get(kind, {}) for kind in ('plain', 'joint', 'SE'))
        n = len(plain.keys() & joint.keys())
        if n:
            what = f'{NETWORKS[model]} on {DATA[data]}, ' + ('fine-tuned' if start else 'from scratch')
            line = [f'{what}, {images:,} images', epochs, n, errors(plain), errors(joint), difference(joint, plain)]
            cells.append(line + [f'{errors(se)}, {difference(se, plain)}' if se else ''] * with_se)
    head = '| network and data | epochs | n | plain, % | AWM joint, % | difference (95 %) |'
    return lines(head + ' SE, %, and its difference |' * with_se, cells, 1)


def against_se(rows: List[Dict[str, Any]]) -> str:
    """The second table of hub/README.md: where SE was trained, error and cost of all three."""
    with BENCHMARK.open() as file:
        speeds = {(line['model'], line['phase'], line['mode']): line['ratio'] for line in csv.DictReader(file)}
    cells = []
    for (data, model, _, _, epochs), kinds in group(rows).items():
        for kind, runs in kinds.items() if 'SE' in kinds else ():
            if kind not in COMPARED:
                continue
            cells.append((
                f'{NETWORKS[model]} on {DATA[data]}, {epochs} epochs', kind, len(runs), errors(runs),
                *(difference(runs, kinds.get(other, {})) if kind != other else '' for other in ('plain', 'SE')),
                f'{next(iter(runs.values()))["param_count"]:.2f}',
                f'{float(speeds[model + COMPARED[kind], "joint" if kind == "joint" else "", "train"]):.2f}'))
    return lines(
        '| network and data | trained | n | test error, % | difference from plain | from SE | parameters, M | '
        'training images/s, plain = 1 |', cells, 2)


def text(rows: List[Dict[str, Any]]) -> str:
    """The CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command')
    commands.add_parser('run').add_argument('name', help='name of the run, its end the seed: r14_t3_s0')
    commands.add_parser('keep').add_argument('folder', type=Path)
    args, flags = parser.parse_known_args()
    if flags and args.command != 'run':
        parser.error(f'unknown: {flags}')
    if args.command == 'run':
        run(args.name, flags)
    elif args.command == 'keep':
        keep(args.folder)
    found = rows()
    CSV.write_text(text(found), encoding='utf-8')
    tables = (HUB / 'README.md', table), (HUB / 'README.md', against_se), (HUB.parent / 'README.md', summary)
    for path, new in ((path, make(found)) for path, make in tables):
        head = re.escape(new[:28]) + '.*'  # a column may come
        readme = path.read_text(encoding='utf-8')
        path.write_text(re.sub(rf'{head}\n(?:\|.*\n)+', lambda _, new=new: f'{new}\n', readme), encoding='utf-8')
        print(f'{new}\n')


if __name__ == '__main__':
    main()
