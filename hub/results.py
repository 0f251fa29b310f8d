"""The runs that the results rest on, and the table of them.

    python hub/results.py add RUN       keeps what train.py and validate.py (RUN/test.json) left of a run in hub/runs/
    python hub/results.py               writes hub/results-cifar10.csv, prints the table of the README
"""
import argparse
import csv
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any, Dict, List

import yaml
from scipy.stats import ttest_ind

from timm_awm.hub.run import read_summary, without_paths

HUB = Path(__file__).parent
RUNS = HUB / 'runs'
CSV = HUB / 'results-cifar10.csv'
# the paper's test errors in %: the best of 700 passes with AWM, of 165 without
PAPER = {
    ('awm_resnet14_cifar', 'plain'): '9.21', ('awm_resnet14_cifar', 't = 3'): '8.13',
    ('awm_resnet20_cifar', 'plain'): '8.42', ('awm_resnet20_cifar', 't = 3'): '6.73',
}


def add(run: Path) -> None:
    """Copies a finished run, without the folders of this machine."""
    goal = RUNS / run.name
    goal.mkdir(parents=True)
    args = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    (goal / 'args.yaml').write_text(yaml.safe_dump(without_paths(args)), encoding='utf-8')
    for name in ('summary.csv', 'test.json'):
        shutil.copyfile(run / name, goal / name)


def setting(args: Dict[str, Any]) -> str:
    """How a run was trained, but for its length and its seed."""
    if args['opt'] != 'alternating':
        return 'plain'
    period, merge_period = (args['opt_kwargs'].get(key) for key in ('period', 'merge_period'))
    if period == 0:
        return 'joint'
    return f't = {period}' + (f' and {merge_period}' if merge_period else '')


def row(run: Path) -> Dict[str, Any]:
    """A line of the CSV: timm's columns, then ours."""
    args = yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8'))
    test = json.loads((run / 'test.json').read_text(encoding='utf-8'))
    summary = read_summary(run)
    evaluated = {epoch: float(line['eval_top1']) for epoch, line in summary.items()}
    passes = args['epochs']
    assert sorted(evaluated) == list(range(passes)), f'{run} is not finished'
    best = max(evaluated, key=lambda epoch: (evaluated[epoch], -epoch))
    merges = sum(line.get('train_phase') == 'merge' for line in summary.values())
    return {
        'model': args['model'],
        **{name: test[name] for name in (
            'img_size', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'crop_pct', 'interpolation')},
        'setting': setting(args),
        'passes': passes,
        'backbone_passes': passes - merges,
        'merge_passes': merges,
        'seed': args['seed'],
        'held_out_top1': evaluated[passes - 1],
        'best_held_out_top1': evaluated[best],
        'best_epoch': best,
        'run': run.name,
    }


def rows() -> List[Dict[str, Any]]:
    return [row(path.parent) for path in sorted(RUNS.glob('*/args.yaml'))]


def table(rows: List[Dict[str, Any]]) -> str:
    """The README's table: means and spreads of the test error after the last pass, and differences from the plain
    control of as many passes."""
    groups: Dict[Any, List[float]] = {}
    for r in rows:
        groups.setdefault((r['model'], r['passes'], r['setting']), []).append(r['top1_err'])
    lines = [
        '| network | passes | trained | runs | test error, % | difference from plain | paper, % |',
        '| --- | ---: | --- | ---: | ---: | ---: | ---: |',
    ]
    for (model, passes, how), errors in sorted(groups.items()):
        spread = f' ± {statistics.stdev(errors):.2f}' if len(errors) > 1 else ''
        plain = groups.get((model, passes, 'plain'), [])
        difference = ''
        if how != 'plain' and plain:
            difference = f'{statistics.mean(errors) - statistics.mean(plain):+.2f}'
            if len(errors) > 1 and len(plain) > 1:
                low, high = ttest_ind(errors, plain, equal_var=False).confidence_interval()
                difference += f' ({low:+.2f} to {high:+.2f})'
        paper = PAPER.get((model, how), '')
        lines.append(
            f'| `{model}` | {passes} | {how} | {len(errors)} | {statistics.mean(errors):.2f}{spread} | {difference} | '
            f'{paper} |')
    return '\n'.join(lines)


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
    commands.add_parser('add').add_argument('runs', nargs='+', type=Path)
    args = parser.parse_args()
    for run in args.runs if args.command else []:
        add(run)
    found = rows()
    CSV.write_text(text(found), encoding='utf-8')
    print(table(found))


if __name__ == '__main__':
    main()
