import csv
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from timm_awm import compare
from timm_awm.layers import merge_parameters
from timm_awm_cli.main import main

TINY = ['-b', '2', '--repeats', '2', '--device', 'cpu']


@pytest.mark.parametrize('name, expected', [
    ('awm_resnet50', ['resnet50', 'awm_resnet50', 'seresnet50']),
    ('awm_resnet50d', ['resnet50d', 'awm_resnet50d', 'awm_resnet50d awm=False attn_layer=se']),
    ('awm_densenet121', ['densenet121', 'awm_densenet121']),
    ('awm_resnet20_cifar', [
        'awm_resnet20_cifar awm=False', 'awm_resnet20_cifar', 'awm_resnet20_cifar awm=False attn_layer=se']),
    ('awm_densenet22_cifar', ['awm_densenet22_cifar awm=False', 'awm_densenet22_cifar']),
])
def test_controls(name, expected):
    models = compare.with_controls(name)
    assert list(models) == expected
    with torch.device('meta'):  # the base is the same network without merges
        assert repr(models[expected[0]]()) == repr(timm.create_model(name, awm=False))


def test_named_models_run_with_the_awm_model_before_them():
    groups = compare.group_models(['awm_resnet50', 'resnet50', 'ecaresnet50d', 'awm_densenet22_cifar', 'resnet18'])
    assert [list(group) for group in groups] == [
        ['resnet50', 'awm_resnet50', 'seresnet50', 'ecaresnet50d'],
        ['awm_densenet22_cifar awm=False', 'awm_densenet22_cifar', 'resnet18']]
    assert [list(group) for group in compare.group_models(['resnet18', 'resnet34'])] == [['resnet18', 'resnet34']]


@pytest.mark.parametrize('phase, trained', [
    ('joint', {'backbone', 'merges'}), ('backbone', {'backbone'}), ('merge', {'merges'})])
def test_a_training_step_trains_what_its_row_says(phase, trained):
    model = timm.create_model('awm_resnet14_cifar')
    of_merges = {id(p) for p in merge_parameters()}
    contender = compare.make_contender(
        'awm', phase, lambda: model, 'train', compare.Settings(), torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    before = [p.clone() for p in model.parameters()]
    contender.step()
    moved = [p for old, p in zip(before, model.parameters()) if not torch.equal(old, p)]
    assert {'merges' if id(p) in of_merges else 'backbone' for p in moved} == trained


@pytest.mark.skipif(not torch.cuda.is_available(), reason='NOT TESTED: peak memory, for it is told on GPUs alone')
def test_peak_memory_holds_the_model_and_what_trains_it():
    create = partial(timm.create_model, 'resnet18')
    device = torch.device('cuda')
    contender = compare.make_contender(
        '', '', create, 'train', compare.Settings(), torch.randn(2, 3, 64, 64, device=device),
        torch.zeros(2, dtype=torch.long, device=device))
    weights = sum(p.nbytes for p in create().parameters()) / 2 ** 20
    assert 3 * weights < contender.peak_mib < 6 * weights  # weights, gradients, momentum; activations


def test_table_and_csv(tmp_path, capsys):
    path = tmp_path / 'new folder' / 'results.csv'
    args = ['-b', '2', '3', '--img-size', '16', '--amp-dtype', 'bfloat16', '--no-channels-last']
    assert main(['compare', 'awm_resnet14_cifar', *TINY, *args, '--csv', str(path)]) == 0
    output = capsys.readouterr().out
    assert f'torch {torch.__version__}' in output and 'environment: ' in output
    base, se = 'awm_resnet14_cifar awm=False', 'awm_resnet14_cifar awm=False attn_layer=se'
    of_training = [(base, ''), *(('awm_resnet14_cifar', phase) for phase in ('joint', 'backbone', 'merge')), (se, '')]
    of_inference = [(base, ''), ('awm_resnet14_cifar', ''), (se, '')]
    expected = [('train', size, *row) for size in '23' for row in of_training]
    expected += [('infer', size, *row) for size in '23' for row in of_inference]
    rows = list(csv.DictReader(path.open()))
    assert [(row['mode'], row['batch_size'], row['model'], row['phase']) for row in rows] == expected
    for row in rows:
        assert f"| {row['model']} | {row['phase']} | {float(row['step_time']):.1f} | " in output
        assert (row['img_size'], row['rounds'], row['base']) == ('16', '2', base)
        if row['model'] == base:
            assert float(row['ratio']) == 1


def test_an_error_keeps_what_was_measured_before(tmp_path, capsys):
    args = ['--repeats', '2', '--mode', 'infer', '--img-size', '160', '--device', 'cpu', '-b', '2', str(10 ** 12)]
    assert main(['compare', 'test_resnet', 'test_vit', *args, '--csv', str(tmp_path / 'results.csv')]) == 1
    output, error = capsys.readouterr()
    assert 'infer, batch 2, 160 px, 2 rounds, ratios to test_resnet:' in output and '| test_vit |' in output
    assert 'memory' in error and len((tmp_path / 'results.csv').read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize('args, message', [
    (['awm_resnet20_cfar'], "Unknown model 'awm_resnet20_cfar': the nearest is 'awm_resnet20_cifar'"),
    (['--device', 'nowhere'], "Device 'nowhere' cannot be used here"),
    (['--csv', 'file/results.csv'], 'file'),
])
def test_errors_leave_no_csv(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('file').touch()
    assert main(['compare', '--csv', 'results.csv', *args]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and 'round' not in captured.err  # nothing was measured
    assert [path.name for path in tmp_path.iterdir()] == ['file']
