import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_awm import bench, cli
from timm_awm.layers import merge_parameters

COMMAND = Path(sys.executable).with_name('timm-awm')
TINY = ['-b', '2', '--warmup', '1', '--repeats', '2', '--device', 'cpu']


def labels(name):
    return [str(spec) for spec in bench.with_controls(name)]


def contenders(name, mode='train', **kwargs):
    x = torch.randn(2, 3, 32, 32)
    return bench.make_contenders(bench.Spec(name, kwargs), mode, bench.Settings(), x, torch.tensor([0, 1]), 10)


@pytest.mark.parametrize('name, expected', [
    ('awm_resnet50', ['resnet50', 'awm_resnet50', 'seresnet50']),
    ('awm_resnet50d', ['resnet50d', 'awm_resnet50d', 'awm_resnet50d awm=False attn_layer=se']),
    ('awm_resnet20_cifar', [
        'awm_resnet20_cifar awm=False', 'awm_resnet20_cifar', 'awm_resnet20_cifar awm=False attn_layer=se']),
    ('awm_densenet22_cifar', ['awm_densenet22_cifar awm=False', 'awm_densenet22_cifar']),
])
def test_controls(name, expected):
    assert labels(name) == expected


def test_a_control_that_is_not_timms_own_network_runs_beside_it(monkeypatch):
    base, *others = labels('awm_densenet121')
    assert base == 'densenet121' and others[-1] == 'awm_densenet121'
    monkeypatch.setattr(bench, 'repr', id, raising=False)
    assert labels('awm_densenet121') == ['densenet121', 'awm_densenet121 awm=False', 'awm_densenet121']


def test_every_control_can_be_built():
    with torch.device('meta'):
        for name in timm.list_models('awm_*'):
            for spec in bench.with_controls(name):
                assert isinstance(spec.create(num_classes=10), nn.Module)


def test_named_models_run_with_the_awm_model_before_them():
    groups = bench.group_contenders(['awm_resnet50', 'resnet50', 'ecaresnet50d', 'awm_densenet22_cifar', 'resnet18'])
    assert [[str(spec) for spec in group] for group in groups] == [
        ['resnet50', 'awm_resnet50', 'seresnet50', 'ecaresnet50d'],
        ['awm_densenet22_cifar awm=False', 'awm_densenet22_cifar', 'resnet18']]
    assert bench.group_contenders(['resnet18', 'resnet34']) == [[bench.Spec('resnet18'), bench.Spec('resnet34')]]


def test_each_phase_trains_its_side():
    backbone, merge = contenders('awm_resnet14_cifar')
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


def test_inference_changes_nothing():
    contender, = contenders('awm_resnet14_cifar', 'infer')
    before = {k: v.clone() for k, v in contender.model.state_dict().items()}
    contender.step()
    assert all(torch.equal(v, before[k]) for k, v in contender.model.state_dict().items())


def test_peak_memory_of_known_tensors():
    mib = 2 ** 20

    def step():
        a = torch.empty(3 * mib, dtype=torch.uint8)
        b = torch.empty(4 * mib, dtype=torch.uint8)
        del a
        c = torch.empty(2 * mib, dtype=torch.uint8)
        del b, c
        torch.empty(5 * mib, dtype=torch.uint8)

    assert bench.peak_memory(step, torch.device('cpu')) == 7 * mib
    assert bench.peak_memory(lambda: None, torch.device('cpu')) == 0


def test_counts_of_a_known_network():
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
        nn.Linear(320, 10, bias=False))
    x_size, map_size, conv_size, linear_size, logits_size = 2 * 3 * 64, 2 * 5 * 64, 5 * 3 * 9, 3200, 20
    macs = 2 * 64 * conv_size + 2 * linear_size
    conv = x_size + conv_size + map_size
    linear = map_size + linear_size + logits_size

    assert bench.count(net.eval(), x, y) == (2 * macs, 4 * (conv + linear), map_size + logits_size)

    trained = conv_size + 2 * 5 + linear_size
    counts = bench.count(net.train(), x, y)
    assert counts.flops == 2 * (macs + 2 * 64 * conv_size + 2 * 2 * linear_size)  # images need no gradient
    assert counts.bytes == 4 * (2 * conv + 3 * linear + 8 * map_size + 5 * trained)

    net[0].weight.requires_grad_(False)
    net[4].weight.requires_grad_(False)
    counts = bench.count(net, x, y)
    assert counts.flops == 2 * (macs + 2 * linear_size)
    assert counts.bytes == 4 * (conv + 2 * linear + 8 * map_size + 5 * 10)


def test_macs_and_activations_are_those_of_timms_table():
    with torch.device('meta'):
        model, x = timm.create_model('resnet50').eval(), torch.empty(1, 3, 224, 224)
    counts = bench.count(model, x, torch.empty(1, device='meta'))
    assert round(counts.flops / 2e9, 2) == 4.09  # timm's 4.11 counts pooling too
    assert round(counts.activations / 1e6, 2) == 11.11


def test_table_and_csv(tmp_path, capsys):
    path = tmp_path / 'results.csv'
    assert cli.main(['bench', 'awm_resnet14_cifar', *TINY, '--csv', str(path)]) == 0
    output = capsys.readouterr().out
    assert f'torch {torch.__version__}' in output and 'allocator: ' in output and 'BatchNorm not folded' in output
    with path.open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert tuple(reader.fieldnames) == bench.COLUMNS
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
            assert [float(row[f'{name}ratio']) for name in ('', 'peak_', 'flops_', 'bytes_')] == [1] * 4
    backbone, merge = rows[1:3]
    assert 1 < float(backbone['flops_ratio']) < 1.01 and 1 < float(backbone['bytes_ratio']) < 1.1
    assert float(merge['flops_ratio']) < .7 and float(merge['bytes_ratio']) < .8
    assert float(rows[5]['param_count']) == .18 and float(rows[5]['infer_gmacs']) == .03


@pytest.mark.parametrize('args', [['--amp-dtype', 'bfloat16'], ['--no-channels-last', '--img-size', '16']])
def test_settings(args, capsys):
    assert cli.main(['bench', 'awm_densenet22_cifar', *TINY, '--mode', 'train', *args]) == 0
    assert '| awm_densenet22_cifar | merge |' in capsys.readouterr().out


def test_any_model_of_timm(capsys):
    assert cli.main(['bench', 'test_resnet', 'test_vit', *TINY, '--mode', 'infer']) == 0
    assert 'ratios to test_resnet:' in capsys.readouterr().out


def test_help_tells_the_two_commands_apart(capsys):
    with pytest.raises(SystemExit, match='0'):
        cli.main(['bench', '--help'])
    help_text = ' '.join(capsys.readouterr().out.split())
    assert "`timm-awm benchmark` runs timm's benchmark.py on one model" in help_text
    assert 'Example: timm-awm bench awm_resnet50' in help_text


@pytest.mark.parametrize('args, message', [
    (['awm_resnet2_cifar'], "Unknown model 'awm_resnet2_cifar', the nearest is 'awm_resnet"),
    (['--device', 'nowhere'], "Device 'nowhere' cannot be used here"),
    (['--device', 'cpu', '--img-size', '2'], 'Input height must be at least 4'),
    (['--device', 'cpu', '-b', str(10 ** 12)], f'for a batch of {10 ** 12}: give a smaller --batch-size.'),
])
def test_errors_leave_no_csv(args, message, tmp_path, capsys):
    path = tmp_path / 'results.csv'
    assert cli.main(['bench', *args, '--csv', str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_csv_is_opened_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, '_bench', lambda *args: pytest.fail('measured'))
    path = tmp_path / 'results.csv'
    path.write_text('precious')
    assert cli.main(['bench', '--csv', str(path)]) == 1
    assert 'File exists' in capsys.readouterr().err and path.read_text() == 'precious'
    assert cli.main(['bench', '--csv', str(tmp_path / 'no' / 'folder.csv')]) == 1
    assert 'No such file' in capsys.readouterr().err


def test_an_interrupted_run_prints_what_it_has(tmp_path):
    path = tmp_path / 'results.csv'
    process = subprocess.Popen(
        [COMMAND, 'bench', 'awm_resnet14_cifar', *TINY, '--repeats', '1000000', '--mode', 'infer', '--csv', path],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for line in process.stderr:
        if 'round 3 ' in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Interrupted.' in errors
    assert '| awm_resnet14_cifar |  | ' in output
    assert len(path.read_text().splitlines()) == 1 + 3
