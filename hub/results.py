"""The runs that the results rest on, and the table of them.

    python hub/results.py run NAME -c RECIPE --seed 0 ...   trains with timm's train.py (goes on with a run that was
                                                            stopped), tests once, keeps the run in hub/results/
    python hub/results.py keep FOLDER                       keeps a run that is trained and tested
    python hub/results.py                                   writes hub/results/results.csv, and hub/README.md's table
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
from typing import Any, Dict, List

import yaml
from scipy.stats import ttest_ind

from timm_awm import scripts
from timm_awm.hub.run import TrainingRun, data_name

HUB = Path(__file__).parent
README = HUB / 'README.md'
RUNS = HUB / 'results'
OUTPUT = HUB.parent / 'output' / 'train'  # of train.py
CSV = RUNS / 'results.csv'
# what says where a run was made, and nothing about its result
MACHINE = {
    'dataset', 'data_dir', 'device', 'device_modules', 'experiment', 'no_prefetcher', 'output', 'pin_mem', 'resume',
    'workers'}
# the paper's test errors in %, in the authors' code of 700 passes, plain 165: beside runs as long or in proportion
PAPER = {
    ('cifar10', 'awm_resnet14_cifar'): ('9.21', '8.13'), ('cifar10', 'awm_resnet20_cifar'): ('8.42', '6.73'),
    ('cifar100', 'awm_resnet14_cifar'): ('34.01', '31.77'), ('cifar100', 'awm_resnet20_cifar'): ('32.62', '30.57')}


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
    """How a run was trained, but for its length and its seed."""
    model_kwargs = {key: value for key, value in args.get('model_kwargs', {}).items() if key != 'awm'}
    options = dict(args['opt_kwargs'])
    period, merge_period = options.pop('period', None), options.pop('merge_period', None)
    if args['opt'] != 'alternating':
        how = 'plain'
    elif 'train' in options:
        how = f'`train={options["train"]}`'
    elif period == 0:
        how = 'joint'
    else:
        how = f't = {3 if period is None else period}' + (f' and {merge_period}' if merge_period else '')
    changed = {**model_kwargs, **{key: value for key, value in options.items() if key.startswith('merge_')}}
    return ', '.join([how, *(f'`{key}={value}`' for key, value in changed.items())])


def row(folder: Path) -> Dict[str, Any]:
    """A line of the CSV: timm's columns, then ours."""
    record = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
    args = {**read_yaml(scripts.find_recipe(record['recipe'])), **record['overrides']}
    test = json.loads((folder / 'test.json').read_text(encoding='utf-8'))
    summary = TrainingRun(folder).summary
    evaluated = {epoch: float(line['eval_top1']) for epoch, line in summary.items()}
    passes = args['epochs']
    assert sorted(evaluated) == list(range(passes)), f'{folder} is not finished'
    best = max(evaluated, key=lambda epoch: (evaluated[epoch], -epoch))
    phases = [line.get('train_phase', 'backbone') for line in summary.values()]  # plain networks have no phases
    return {
        'data': record['data'],
        'model': args['model'],
        **{name: test[name] for name in (
            'img_size', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'crop_pct', 'interpolation')},
        'setting': setting(args),
        'passes': passes,
        'backbone_passes': passes - phases.count('merge'),
        'merge_passes': passes - phases.count('backbone'),
        'seed': args['seed'],
        'eval_split': args['val_split'],
        'eval_top1': evaluated[passes - 1],
        'best_eval_top1': evaluated[best],
        'best_epoch': best,
        'minutes': record['minutes'],
        'commit': record['commit'],
        'recipe': record['recipe'],
        'run': folder.name,
    }


def rows() -> List[Dict[str, Any]]:
    return [row(path.parent) for path in sorted(RUNS.glob('*/run.json'))]


def table(rows: List[Dict[str, Any]]) -> str:
    """The table of hub/README.md: means and spreads of the test error after the last pass, and differences from the
    plain control of as many passes."""
    groups: Dict[Any, List[Dict[str, Any]]] = {}
    for r in rows:
        t = re.search(r't = (\d+)', r['setting'])  # 12 behind 3
        key = r['data'], r['model'], -r['passes'], r['setting'] != 'plain', int(t[1]) if t else 0, r['setting']
        groups.setdefault(key, []).append(r)
    for runs in groups.values():
        if len({r['seed'] for r in runs}) < len(runs):
            raise ValueError(f'Of {[r["run"] for r in runs]} some have the same seed: one run twice is no evidence.')
    lines = [
        '| data | network | passes | of the backbone | trained | runs | held-out error, % | test error, % | '
        'difference from plain | minutes | paper, % |',
        '| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for _, runs in sorted(groups.items()):
        first, errors = runs[0], [r['top1_err'] for r in runs]
        held_out = [100 - r['eval_top1'] for r in runs if r['eval_split'] != 'test']  # none in the paper's own runs
        plain = [r['top1_err'] for r in rows if r['setting'] == 'plain' and all(
            r[name] == first[name] for name in ('data', 'model', 'passes'))]
        difference = ''
        if first['setting'] != 'plain' and plain:
            difference = f'{statistics.mean(errors) - statistics.mean(plain):+.2f}'
            if len(errors) > 1 and len(plain) > 1:
                low, high = ttest_ind(errors, plain, equal_var=False).confidence_interval()
                difference += f' ({low:+.2f} to {high:+.2f})'
        of_paper = PAPER.get((first['data'], first['model']), ('', ''))
        paper = {('plain', 14): 0, ('plain', 165): 0, ('t = 3', 60): 1, ('t = 3', 700): 1}.get(
            (first['setting'], first['passes']))
        cells = (
            first['data'], f'`{first["model"]}`', first['passes'], first['backbone_passes'], first['setting'],
            len(runs), mean_and_spread(held_out), mean_and_spread(errors), difference,
            round(statistics.mean(r['minutes'] for r in runs)), '' if paper is None else of_paper[paper])
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def mean_and_spread(values: List[float]) -> str:
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}' if values else ''


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
    commands.add_parser('run').add_argument('name', help='of the run, its end the seed: r14_t3_s0')
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
    new, readme = table(found), README.read_text(encoding='utf-8')
    head = re.escape(new.partition('\n')[0])
    README.write_text(re.sub(rf'{head}\n(?:\|.*\n)+', lambda _: f'{new}\n', readme), encoding='utf-8')
    print(new)


if __name__ == '__main__':
    main()
