"""The results: the table and the CSV say what the kept runs say, the published weights do what their cards say."""
import csv
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
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
CIFAR10 = os.environ.get('TIMM_AWM_CIFAR10', '')
# of 100 test images, ten of a class, those that the published weights take for another class: with their merges at the
# identity it would be others
MISSED = {
    'awm_resnet14_cifar.plain_c10': [23, 27, 29, 34, 35, 45, 55, 58, 60, 63],
    'awm_resnet14_cifar.t0_c10': [20, 23, 27, 34, 35, 38, 45, 54, 55, 59, 60, 79],
    'awm_resnet14_cifar.t3_c10': [16, 23, 27, 29, 35, 45, 54, 55, 59, 60, 76, 95],
}
RUNS = sorted(path.parent for path in HUB.glob('runs/*/args.yaml'))


def test_the_csv_is_that_of_the_runs():
    assert (HUB / 'results-cifar10.csv').read_text() == RESULTS['text'](RESULTS['rows']())


def test_the_table_stands_in_the_readme():
    assert RESULTS['table'](RESULTS['rows']()) in (HUB.parent / 'README.md').read_text()


@pytest.mark.parametrize('run', RUNS, ids=lambda run: run.name)
def test_a_line_is_what_train_py_and_validate_py_left(run):
    line, = (r for r in csv.DictReader((HUB / 'results-cifar10.csv').open()) if r['run'] == run.name)
    args = yaml.safe_load((run / 'args.yaml').read_text())
    with (run / 'summary.csv').open() as file:
        epochs = [row for row in csv.DictReader(file) if row['epoch'] != 'epoch']
    last = {row['epoch']: row for row in epochs}  # a resumed run has an epoch twice
    assert len(last) == args['epochs'] == int(line['passes'])
    trained = PhaseSchedule(**{k: v for k, v in args['opt_kwargs'].items() if k in ('period', 'merge_period')})
    phases = [trained.phase(epoch) if args['opt'] == 'alternating' else 'backbone' for epoch in range(args['epochs'])]
    assert int(line['backbone_passes']) == sum(phase != 'merge' for phase in phases)
    assert int(line['merge_passes']) == sum(phase != 'backbone' for phase in phases)
    assert int(line['minutes']) > 0
    assert float(line['held_out_top1']) == float(last[str(args['epochs'] - 1)]['eval_top1'])
    assert float(line['best_held_out_top1']) == max(float(row['eval_top1']) for row in last.values())
    assert float(line['top1']) == json.loads((run / 'test.json').read_text())['top1']
    assert int(line['seed']) == args['seed'] and run.name.endswith(f's{args["seed"]}')
    # the test set decided nothing
    assert args['val_split'] == 'train[45000:]' and args['train_split'] == 'train[:45000]'


def test_a_kept_run_says_nothing_of_the_machine(tmp_path, monkeypatch):
    run = tmp_path / 'output' / 'r14_t3_s7'
    run.mkdir(parents=True)
    args = dict(yaml.safe_load((RUNS[0] / 'args.yaml').read_text()), data_dir=str(tmp_path / 'cifar10'), seed=7)
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    for name in ('summary.csv', 'test.json', 'origin.json', 'last.pth.tar'):
        (run / name).write_text('as it is')
    monkeypatch.setitem(RESULTS['keep'].__globals__, 'RUNS', tmp_path / 'runs')
    RESULTS['keep'](run)
    kept = tmp_path / 'runs' / run.name
    assert {path.name for path in kept.iterdir()} == {'args.yaml', 'summary.csv', 'test.json', 'origin.json'}
    assert yaml.safe_load((kept / 'args.yaml').read_text()) == {**args, 'data_dir': 'cifar10'}
    assert (kept / 'summary.csv').read_text() == 'as it is'


def test_differences_and_their_intervals():
    rows = [
        dict(model='m', passes=6, backbone_passes=3, setting=how, top1_err=error, held_out_top1=88, minutes=2,
             seed=seed, run=f'{how}_s{seed}')
        for how, seed, error in (
            ('plain', 0, 10.0), ('plain', 1, 10.4), ('plain', 2, 10.1), ('t = 3', 0, 9.7), ('t = 3', 1, 10.3),
            ('joint', 0, 11.0))]
    *_, plain, joint, third = RESULTS['table'](rows).splitlines()
    a, b = np.array([9.7, 10.3]), np.array([10.0, 10.4, 10.1])
    variances = np.array([a.var(ddof=1) / 2, b.var(ddof=1) / 3])
    freedom = variances.sum() ** 2 / (variances ** 2 / [1, 2]).sum()  # Welch's
    half = student.ppf(0.975, freedom) * np.sqrt(variances.sum())
    difference = a.mean() - b.mean()
    assert f'| {difference:+.2f} ({difference - half:+.2f} to {difference + half:+.2f}) |' in third
    assert f'| {b.mean():.2f} ± {b.std(ddof=1):.2f} |  |' in plain
    assert '| 1 | 12.00 | 11.00 | +0.83 |' in joint
    with pytest.raises(ValueError, match=r"\['joint_s0', 'again'\] some have the same seed"):
        RESULTS['table']([*rows, dict(rows[-1], run='again')])


def test_a_kept_run_is_not_run_again():
    before = {path: path.read_bytes() for path in RUNS[0].iterdir()}
    with pytest.raises(SystemExit, match='There is a run .* already'):
        RESULTS['run'](RUNS[0].name, [])
    assert {path: path.read_bytes() for path in RUNS[0].iterdir()} == before


@pytest.mark.parametrize('opt_kwargs, how', [
    ({}, 't = 3'), (dict(period=5), 't = 5'), (dict(period=0), 'joint'), (dict(train='merge'), '`train=merge`'),
    (dict(period=3, merge_period=1), 't = 3 and 1'),
    (dict(period=0, merge_lr_scale=.1, base='sgd'), 'joint, `merge_lr_scale=0.1`')])
def test_settings(opt_kwargs, how):
    assert RESULTS['setting'](dict(opt='alternating', opt_kwargs=opt_kwargs, model_kwargs={})) == how


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
def test_a_published_model_is_whole_and_its_card_says_what_was_measured(folder):
    model = load_folder(folder)
    assert folder.name.startswith(model.pretrained_cfg['architecture'] + '.' + model.pretrained_cfg['tag'])
    summary = (folder / 'summary.csv').read_bytes()
    run, = (run for run in RUNS if (run / 'summary.csv').read_bytes() == summary)
    assert stated_accuracy(folder) == json.loads((run / 'test.json').read_text())['top1']


def stated_accuracy(folder: Path) -> float:
    results = {r.dataset_split: r.metric_value for r in ModelCard.load(folder / 'README.md').data.eval_results}
    return results['test']


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
@torch.inference_mode()
def test_a_published_model_has_its_accuracy_on_a_slice(folder):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    # a row for each class, its first 10 test images
    sheet = Image.open(Path(__file__).with_name('cifar10_test_100.png'))
    images = [sheet.crop((x, y, x + 32, y + 32)) for y in range(0, 320, 32) for x in range(0, 320, 32)]
    predicted = model(torch.stack([transform(image) for image in images])).argmax(1)
    missed = (predicted != torch.arange(10).repeat_interleave(10)).nonzero().flatten().tolist()
    assert missed == MISSED[folder.name]
    stated = stated_accuracy(folder) / 100
    assert abs(1 - len(missed) / len(images) - stated) < 2.5 * (stated * (1 - stated) / len(images)) ** 0.5


@pytest.mark.skipif(not CIFAR10, reason='NOT TESTED: accuracy on all of CIFAR-10; set TIMM_AWM_CIFAR10 to its folder')
@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
@torch.inference_mode()
def test_a_published_model_has_its_accuracy_on_the_whole_test_set(folder):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    data = create_dataset(f'hfds/{CIFAR10}', split='test', input_key='img', target_key='label')
    config = resolve_data_config({}, model=model)
    loader = create_loader(data, batch_size=250, num_workers=0, use_prefetcher=False, **config)
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    assert correct / len(data) == pytest.approx(stated_accuracy(folder) / 100, abs=1e-4)
