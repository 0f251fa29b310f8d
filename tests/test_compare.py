import csv
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from timm_awm import compare
from timm_awm.layers import merge_parameters
from timm_awm_cli.main import main

COMMAND = Path(sysconfig.get_path('scripts'), 'timm-awm')
TINY = ['-b', '2', '--warmup', '1', '--repeats', '2', '--device', 'cpu']


@pytest.mark.parametrize('name, expected', [
    ('awm_resnet50', ['resnet50', 'awm_resnet50', 'seresnet50']),
    ('awm_resnet50d', ['resnet50d', 'awm_resnet50d', 'awm_resnet50d awm=False attn_layer=se']),
    ('awm_densenet121', ['densenet121', 'awm_densenet121']),
    ('awm_resnet20_cifar', [
        'awm_resnet20_cifar awm=False', 'awm_resnet20_cifar', 'awm_resnet20_cifar awm=False attn_layer=se']),
    ('awm_densenet22_cifar', ['awm_densenet22_cifar awm=False', 'awm_densenet22_cifar']),
])
def test_controls(name, expected):
    assert [str(spec) for spec in compare.with_controls(name)] == expected


def test_named_models_run_with_the_awm_model_before_them():
    groups = compare.group_contenders(['awm_resnet50', 'resnet50', 'ecaresnet50d', 'awm_densenet22_cifar', 'resnet18'])
    assert [[str(spec) for spec in group] for group in groups] == [
        ['resnet50', 'awm_resnet50', 'seresnet50', 'ecaresnet50d'],
        ['awm_densenet22_cifar awm=False', 'awm_densenet22_cifar', 'resnet18']]
    assert compare.group_contenders(['resnet18', 'resnet34']) == [[compare.Spec('resnet18'), compare.Spec('resnet34')]]


def test_each_phase_trains_its_side():
    spec, settings, x, y = compare.Spec('awm_resnet14_cifar'), compare.Settings(), torch.randn(2, 3, 32, 32), [0, 1]
    backbone, merge = compare.make_contenders(spec, 'train', settings, x, torch.tensor(y), 10)
    assert (backbone.phase, merge.phase) == ('backbone', 'merge')
    assert backbone.model is merge.model
    of_merges = {id(p) for p in merge_parameters()}
    for contender in (backbone, merge, backbone):
        before = [p.clone() for p in contender.model.parameters()]
        contender.prepare()
        contender.step()
        for old, p in zip(before, contender.model.parameters()):
            is_idle = (id(p) in of_merges) == (contender is backbone)
            assert p.grad is None
            assert torch.equal(old, p) if is_idle else p.requires_grad
        assert any(not torch.equal(old, p) for old, p in zip(before, contender.model.parameters()))


def test_peak_memory_of_known_tensors():
    mib = 2 ** 20

    def step():
        a = torch.empty(3 * mib, dtype=torch.uint8)
        b = torch.empty(4 * mib, dtype=torch.uint8)
        del a
        c = torch.empty(2 * mib, dtype=torch.uint8)
        del b, c
        torch.empty(5 * mib, dtype=torch.uint8)

    assert compare.peak_memory(step, torch.device('cpu')) == 7 * mib
    assert compare.peak_memory(lambda: None, torch.device('cpu')) == 0


def test_table_and_csv(tmp_path, capsys):
    path = tmp_path / 'results.csv'
    assert main(['compare', 'awm_resnet14_cifar', *TINY, '--csv', str(path)]) == 0
    output = capsys.readouterr().out
    assert f'torch {torch.__version__}' in output and 'environment: ' in output
    with path.open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert tuple(reader.fieldnames) == compare.COLUMNS
    base, se = 'awm_resnet14_cifar awm=False', 'awm_resnet14_cifar awm=False attn_layer=se'
    assert [(row['model'], row['phase'], bool(row['train_step_time'])) for row in rows] == [
        (base, '', True), ('awm_resnet14_cifar', 'backbone', True), ('awm_resnet14_cifar', 'merge', True),
        (se, '', True), (base, '', False), ('awm_resnet14_cifar', '', False), (se, '', False)]
    for row in rows:
        mode = 'train' if row['train_step_time'] else 'infer'
        assert f"| {row['model']} | {row['phase']} | " in output
        assert (row[f'{mode}_batch_size'], row[f'{mode}_img_size'], row['rounds']) == ('2', '32', '2')
        assert row['base'] == base and float(row['peak_mib']) > 0
        if row['model'] == base:
            assert [float(row[f'{name}ratio']) for name in ('', 'peak_')] == [1, 1]
    assert float(rows[5]['param_count']) == .18 and float(rows[5]['infer_gmacs']) == .03


def test_settings_and_any_model(capsys):
    args = ['--amp-dtype', 'bfloat16', '--no-channels-last', '--img-size', '16', '--mode', 'train']
    assert main(['compare', 'test_resnet', 'awm_densenet22_cifar', *TINY, *args]) == 0
    output = capsys.readouterr().out
    assert 'Training step, batch 2, 16 px, 2 rounds, ratios to test_resnet:' in output
    assert '| awm_densenet22_cifar | merge |' in output


@pytest.mark.parametrize('args, message', [
    (['awm_resnet2_cifar'], "Unknown model 'awm_resnet2_cifar'"),
    (['--device', 'nowhere'], "Device 'nowhere' cannot be used here"),
    (['--device', 'cpu', '-b', str(10 ** 12)], 'memory'),
])
def test_errors_leave_no_csv(args, message, tmp_path, capsys):
    path = tmp_path / 'results.csv'
    assert main(['compare', *args, '--csv', str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not path.exists()
    path.write_text('precious')
    assert main(['compare', '--csv', str(path)]) == 1
    assert 'exists already: choose another file' in capsys.readouterr().err and path.read_text() == 'precious'


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
def test_an_interrupted_run_prints_what_it_has(tmp_path):
    path = tmp_path / 'results.csv'
    process = subprocess.Popen(
        [COMMAND, 'compare', 'awm_resnet14_cifar', *TINY, '--repeats', '1000000', '--mode', 'infer', '--csv', path],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    seen = ''
    while '4/1000000' not in seen:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and 'Interrupted.' in errors
    assert '| awm_resnet14_cifar |  | ' in output
    assert len(path.read_text().splitlines()) == 1 + 3
