"""The results: table and CSV say what the kept runs say, the published weights do what their cards say."""
import csv
import json
import os
import re
import runpy
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from scipy.stats import t as student
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config

from timm_awm.hub import load_folder
from timm_awm.optim import PhaseSchedule

HUB = Path(__file__).parents[1] / 'hub'
RESULTS = runpy.run_path(str(HUB / 'results.py'))
FOLDERS = sorted(path.parent for path in HUB.glob('*/config.json'))
CIFAR = os.environ.get('TIMM_AWM_CIFAR', '')


def run_of(folder):
    """The kept run that a published model is of: its card links every epoch."""
    return HUB / re.search(r'\(\.\./(results/\w+)/summary\.csv\)', (folder / 'README.md').read_text())[1]


def test_csv_and_tables_are_those_of_the_runs():
    rows = RESULTS['rows']()
    assert (HUB / 'results' / 'results.csv').read_text() == RESULTS['text'](rows)
    for readme, name in ((HUB, 'table'), (HUB, 'against_se'), (HUB.parent, 'summary')):
        lines = (readme / 'README.md').read_text().splitlines()
        assert [line for line in RESULTS[name](rows).splitlines() if line not in lines] == []


def test_speed_tables_are_those_of_the_benchmark():
    """Each row of the two tables, cell by cell."""
    readme, speed = ((HUB.parent / name).read_text() for name in ('README.md', 'docs/speed.md'))
    measured = {}
    for path in HUB.glob('benchmark-cpu-*.csv'):
        for line in csv.DictReader(path.open()):
            key = line['model'], line['batch_size'], path.stem.endswith('bfloat16')
            measured.setdefault(key, []).append((float(line['ratio']), float(line['ratio_iqr'])))
    rows = re.findall(r'^\| (awm_\w+), \d+ px, (float32|bfloat16), batch (\d+) \| (.*) \|$', speed, re.M)
    assert len(rows) > 5
    for name, dtype, batch, cells in rows:
        own = measured[name, batch, dtype == 'bfloat16']  # joint, both phases, inference
        assert cells.split(' | ')[:4] == [f'{ratio:.2f} ({iqr:.2f})' for ratio, iqr in own]
        in_readme = re.findall(rf'^\| {name}, \d+ px, {dtype}, batch {batch} \| (.*) \|$', readme, re.M)
        assert all(line.split(' | ') == [f'{ratio:.2f}' for ratio, _ in own] for line in in_readme)


def test_the_table_of_what_merges_do_is_that_of_the_analysis():
    models = json.loads((HUB / 'figures' / 'summary.json').read_text())['models'].values()
    rows = re.findall(r'^\| [^|]+ \| ([\d.]+)(?: %)? \| ([\d.]+)(?: %)? \|$', (HUB / 'README.md').read_text(), re.M)
    for m, column in zip(models, zip(*rows), strict=True):  # without a row an error
        values = [m['top1'], m['ablation']['constant'], m['ablation']['all'], 100 * m['between_class_share'],
                  m['cumulative_match']['mixing_weights'][0]]
        assert column == tuple(f'{x:.{n}f}' for x, n in zip(values, (2, 2, 2, 1, 1)))


def test_a_line_is_what_train_py_and_validate_py_left():
    for line in csv.DictReader((HUB / 'results' / 'results.csv').open()):
        run = HUB / 'results' / line['run']
        record = json.loads((run / 'run.json').read_text())
        recipe = (HUB.parent / 'recipes' / f'{record["recipe"]}.yaml').read_text()
        args = {**yaml.safe_load(recipe), **record['overrides']}
        # a resumed run has its header again, and may have an epoch twice
        by_epoch = {epoch['epoch']: epoch for epoch in csv.DictReader((run / 'summary.csv').open())}
        epochs = [by_epoch[str(epoch)] for epoch in range(args['epochs'])]
        assert by_epoch.keys() - {str(epoch) for epoch in range(int(line['epochs']))} <= {'epoch'}
        schedule = {key: args['opt_kwargs'][key] for key in ('period', 'merge_period') if key in args['opt_kwargs']}
        trained = PhaseSchedule(**schedule).phase if args['opt'] == 'alternating' else lambda epoch: 'backbone'
        assert int(line['backbone_epochs']) == sum(trained(epoch) != 'merge' for epoch in range(args['epochs']))
        assert float(line['eval_top1']) == float(epochs[-1]['eval_top1'])
        assert float(line['best_eval_top1']) == max(float(epoch['eval_top1']) for epoch in epochs)
        assert float(line['top1']) == json.loads((run / 'test.json').read_text())['top1']
        assert int(line['seed']) == args['seed'] and run.name.endswith(f's{args["seed"]}')
        # the test set decided nothing, and none of its images was trained on
        assert line['eval_split'] == ('test' if args['train_split'] == 'train' else 'train[45000:]')
        assert args['train_split'] in ('train', f'train[:{line["images"]}]')


def test_a_kept_run_has_its_overrides_and_nothing_of_the_machine(tmp_path, monkeypatch):
    run = tmp_path / 'output' / 'r14_t3_s7'
    run.mkdir(parents=True)
    recipe = HUB.parent / 'recipes' / 'cifar10_short' / 'awm_resnet14_cifar.yaml'
    args = dict(yaml.safe_load(recipe.read_text()), data_dir=str(tmp_path / 'cifar10'), seed=7, lr=0.05, drop=0.0)
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, 'dataset': f'hfds/{tmp_path}/cifar10'}))
    (run / 'origin.json').write_text(json.dumps(dict(minutes=3, commit='abc', flags=['seed', 'lr', 'data_dir'])))
    for name in ('summary.csv', 'test.json', 'last.pth.tar'):
        (run / name).write_text('as it is')
    monkeypatch.setitem(RESULTS['keep'].__globals__, 'RUNS', tmp_path / 'runs')
    RESULTS['keep'](run)
    kept = tmp_path / 'runs' / run.name
    assert {path.name for path in kept.iterdir()} == {'run.json', 'summary.csv', 'test.json'}
    record = json.loads((kept / 'run.json').read_text())
    assert record['recipe'] == 'cifar10_short/awm_resnet14_cifar' and record['data'] == 'cifar10'
    assert record['overrides'] == dict(lr=0.05, seed=7) and record['minutes'] == 3 and record['commit'] == 'abc'
    assert str(tmp_path) not in (kept / 'run.json').read_text() and (kept / 'summary.csv').read_text() == 'as it is'
    with pytest.raises(SystemExit, match='There is a run .* already'):
        RESULTS['run'](run.name, [])


def test_differences_are_paired_by_seed():
    def runs(kind, *errors):
        return [
            dict(data='cifar10', model='awm_resnet20_cifar', start='', images=45000, epochs=6, backbone_epochs=6,
                 setting=kind, top1_err=error, eval_top1=88, eval_split='train[45000:]', seed=seed, run=kind)
            for seed, error in enumerate(errors)]

    rows = [*runs('plain', 10.0, 10.4, 10.1), *runs('joint', 9.7, 10.3), *runs('SE', 11.0)]
    *_, plain, se, joint = RESULTS['table'](rows).splitlines()
    pairs = np.array([9.7 - 10.0, 10.3 - 10.4])
    half = student.ppf(0.975, 1) * pairs.std(ddof=1) / 2 ** 0.5
    interval = f'{pairs.mean():+.2f} ({pairs.mean() - half:+.2f} to {pairs.mean() + half:+.2f})'
    assert f'| 2 | 12.00 ± 0.00 | 10.00 ± 0.42 | {interval} |' in joint
    assert '| 1 | 12.00 | 11.00 | +1.00 |' in se and '| 3 | 12.00 ± 0.00 | 10.17 ± 0.21 |  |' in plain
    assert f'| 6 | 2 | 10.17 ± 0.21 | 10.00 ± 0.42 | {interval} | 11.00, +1.00 |' in RESULTS['summary'](rows)
    with pytest.raises(ValueError, match='have the same seed'):
        RESULTS['table']([*rows, *runs('SE', 11.0)])


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
def test_a_card_has_the_means_of_all_runs_of_its_kind(folder):
    card = ' '.join((folder / 'README.md').read_text().split())
    rows = RESULTS['rows']()
    own, = (row for row in rows if row['run'] == run_of(folder).name)
    alike = [row for row in rows if all(row[key] == own[key] for key in ('data', 'model', 'start', 'images', 'epochs'))]
    runs, plain = ([row['top1'] for row in alike if row['setting'] == setting] for setting in (own['setting'], 'plain'))
    numbers = {2: 'two', 3: 'three'}
    of_runs = ', one run,'
    if runs[1:]:
        of_runs = f' of {numbers[len(runs)]} runs with a mean of {statistics.mean(runs):.2f} %'
    assert f'Seed {own["seed"]}{of_runs}' in card
    if own['setting'] != 'plain':
        same_seed, = (row['top1'] for row in alike if (row['setting'], row['seed']) == ('plain', own['seed']))
        of_plain = f', the mean of {numbers[len(plain)]} runs ({same_seed:.2f} % with this seed' if plain[1:] else ''
        assert f'has {statistics.mean(plain):.2f} %{of_plain}' in card


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
@torch.inference_mode()
def test_a_published_model_has_the_accuracy_of_its_card(folder):
    model = load_folder(folder).eval()
    assert folder.name == f'{model.pretrained_cfg["architecture"]}.{model.pretrained_cfg["tag"]}'
    of_card = ModelCard.load(folder / 'README.md').data.eval_results
    results, data_name = {r.dataset_split: r.metric_value for r in of_card}, of_card[0].dataset_name
    assert results['test'] == json.loads((run_of(folder) / 'test.json').read_text())['top1']
    stated, config = results['test'] / 100, resolve_data_config({}, model=model)
    # the first test images of each class, 10 or 1
    sheet, transform = Image.open(Path(__file__).with_name(f'{data_name}_test_100.png')), create_transform(**config)
    images = [transform(sheet.crop((x, y, x + 32, y + 32))) for y in range(0, 320, 32) for x in range(0, 320, 32)]
    correct = model(torch.stack(images)).argmax(1) == torch.arange(100) // (100 // model.num_classes)
    assert abs(correct.float().mean() - stated) < 2.5 * (stated * (1 - stated) / 100) ** 0.5
    if CIFAR:  # all test images
        target_key = yaml.safe_load((folder / 'args.yaml').read_text())['target_key']
        data = create_dataset(f'hfds/{CIFAR}/{data_name}', split='test', input_key='img', target_key=target_key)
        loader = create_loader(data, batch_size=250, num_workers=0, use_prefetcher=False, **config)
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
        assert right / len(data) == pytest.approx(stated, abs=1e-4)
