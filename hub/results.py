"""The runs that the results rest on, and the table of them.

    python hub/results.py run NAME -c RECIPE --seed 0 ...   trains with timm's train.py (goes on with a run that was
                                                            stopped), tests once, keeps the run in hub/runs/
    python hub/results.py                                   writes hub/results-cifar10.csv and the table in the README
"""
import argparse
import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import yaml
from scipy.stats import ttest_ind

from timm_awm.hub.run import read_summary, recipe_of, without_paths

HUB = Path(__file__).parent
README = HUB.parent / 'README.md'
RUNS = HUB / 'runs'
OUTPUT = HUB.parent / 'output' / 'train'  # of train.py
CSV = HUB / 'results-cifar10.csv'
DATASET = 'hfds/uoft-cs/cifar10'
# the paper's test errors in %, the best of 700 passes with AWM, of 165 without: beside runs as long or in proportion
PAPER = {
    ('awm_resnet14_cifar', 14, 'plain'): '9.21', ('awm_resnet14_cifar', 60, 't = 3'): '8.13',
    ('awm_resnet14_cifar', 165, 'plain'): '9.21', ('awm_resnet14_cifar', 700, 't = 3'): '8.13',
    ('awm_resnet20_cifar', 14, 'plain'): '8.42', ('awm_resnet20_cifar', 60, 't = 3'): '6.73',
    ('awm_resnet20_cifar', 165, 'plain'): '8.42', ('awm_resnet20_cifar', 700, 't = 3'): '6.73',
}


def run(name: str, flags: List[str]) -> None:
    """Trains, reads the test set, and keeps the run."""
    if (RUNS / name).exists():
        sys.exit(f'There is a run {RUNS / name} already: give another name, or delete that to make it anew.')
    folder = OUTPUT / name
    awm = [sys.executable, '-m', 'timm_awm']
    commit = git('rev-parse', '--short', 'HEAD')
    if git('status', '--porcelain', '--', 'timm_awm', 'recipes'):  # results of other runs change nothing
        commit += '-dirty'
    origin = folder / 'origin.json'
    before = json.loads(origin.read_text(encoding='utf-8'))['minutes'] if origin.is_file() else 0
    start = time.monotonic()
    try:
        subprocess.run(
            [*awm, 'train', '--output', OUTPUT, '--experiment', name, '--resume', 'auto', *flags], check=True)
    finally:  # what a run took that was stopped counts too
        if folder.is_dir():
            minutes = before + round((time.monotonic() - start) / 60)
            origin.write_text(json.dumps({'minutes': minutes, 'commit': commit}) + '\n', encoding='utf-8')
    args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    given = {
        '--model': args['model'], '--checkpoint': folder / 'last.pth.tar', '--num-classes': args['num_classes'],
        '--dataset': args['dataset'], '--data-dir': args['data_dir'], '--split': 'test',
        '--input-key': args['input_key'], '--target-key': args['target_key'], '--device': args['device'],
        '--results-file': folder / 'test.json', '--results-format': 'json'}
    model_kwargs = [f'{key}={value}' for key, value in args['model_kwargs'].items()]
    subprocess.run(
        [*awm, 'validate', *(str(part) for flag in given.items() if flag[1] is not None for part in flag),
         *['--model-kwargs'][:len(model_kwargs)], *model_kwargs], check=True)
    keep(folder)


def git(*args: str) -> str:
    return subprocess.run(['git', *args], cwd=HUB.parent, check=True, text=True, capture_output=True).stdout.strip()


def keep(run: Path) -> None:
    """Copies what is left of a finished run, without the folders of this machine."""
    goal = RUNS / run.name
    goal.mkdir(parents=True)
    args = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    (goal / 'args.yaml').write_text(yaml.safe_dump(without_paths(args)), encoding='utf-8')
    for name in ('summary.csv', 'test.json', 'origin.json'):
        shutil.copyfile(run / name, goal / name)


def setting(args: Dict[str, Any]) -> str:
    """How a run was trained, but for its length and its seed."""
    model_kwargs = {key: value for key, value in args['model_kwargs'].items() if key != 'awm'}
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


def row(run: Path) -> Dict[str, Any]:
    """A line of the CSV: timm's columns, then ours."""
    args = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    test = json.loads((run / 'test.json').read_text(encoding='utf-8'))
    summary = read_summary(run)
    recipe = recipe_of({**args, 'dataset': DATASET})  # from disk, it has the name of a folder
    evaluated = {epoch: float(line['eval_top1']) for epoch, line in summary.items()}
    passes = args['epochs']
    assert sorted(evaluated) == list(range(passes)), f'{run} is not finished'
    best = max(evaluated, key=lambda epoch: (evaluated[epoch], -epoch))
    phases = [line.get('train_phase', 'backbone') for line in summary.values()]  # plain networks have no phases
    return {
        'model': args['model'],
        **{name: test[name] for name in (
            'img_size', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'crop_pct', 'interpolation')},
        'setting': setting(args),
        'passes': passes,
        'backbone_passes': passes - phases.count('merge'),
        'merge_passes': passes - phases.count('backbone'),
        'seed': args['seed'],
        'held_out_top1': evaluated[passes - 1],
        'best_held_out_top1': evaluated[best],
        'best_epoch': best,
        **json.loads((run / 'origin.json').read_text(encoding='utf-8')),
        'recipe': f'{recipe.parent.name}/{recipe.stem}' if recipe else '',
        'run': run.name,
    }


def rows() -> List[Dict[str, Any]]:
    return [row(path.parent) for path in sorted(RUNS.glob('*/args.yaml'))]


def table(rows: List[Dict[str, Any]]) -> str:
    """The README's table: means and spreads of the test error after the last pass, and differences from the plain
    control of as many passes."""
    groups: Dict[Any, List[Dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r['model'], -r['passes'], r['setting'] != 'plain', r['setting']), []).append(r)
    for runs in groups.values():
        if len({r['seed'] for r in runs}) < len(runs):
            raise ValueError(f'Of {[r["run"] for r in runs]} some have the same seed: one run twice is no evidence.')
    lines = [
        '| network | passes | of the backbone | trained | runs | held-out error, % | test error, % | '
        'difference from plain | minutes | paper, % |',
        '| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for (model, passes, is_awm, how), runs in sorted(groups.items()):
        errors = [r['top1_err'] for r in runs]
        plain = [r['top1_err'] for r in groups.get((model, passes, False, 'plain'), [])]
        difference = ''
        if is_awm and plain:
            difference = f'{statistics.mean(errors) - statistics.mean(plain):+.2f}'
            if len(errors) > 1 and len(plain) > 1:
                low, high = ttest_ind(errors, plain, equal_var=False).confidence_interval()
                difference += f' ({low:+.2f} to {high:+.2f})'
        cells = (
            f'`{model}`', -passes, runs[0]['backbone_passes'], how, len(runs),
            mean_and_spread([100 - r['held_out_top1'] for r in runs]), mean_and_spread(errors), difference,
            round(statistics.mean(r['minutes'] for r in runs)), PAPER.get((model, -passes, how), ''))
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def mean_and_spread(values: List[float]) -> str:
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


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
    running = commands.add_parser('run')
    running.add_argument('name', help='of the run, its end the seed: r14_t3_s0')
    args, flags = parser.parse_known_args()
    if args.command:
        run(args.name, flags)
    elif flags:
        parser.error(f'unknown: {flags}')
    found = rows()
    CSV.write_text(text(found), encoding='utf-8')
    new, readme = table(found), README.read_text(encoding='utf-8')
    head = re.escape(new.partition('\n')[0])
    README.write_text(re.sub(rf'{head}\n(?:\|.*\n)+', lambda _: f'{new}\n', readme), encoding='utf-8')
    print(new)


if __name__ == '__main__':
    main()
