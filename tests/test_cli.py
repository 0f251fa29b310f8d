import csv
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import timm_awm
from timm_awm.layers import MixingWeights, count_parameters
from timm_awm_cli.main import COMMANDS, main

COMMAND = Path(sysconfig.get_path('scripts'), 'timm-awm')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}  # the tests run side by side


@pytest.mark.slow
def test_demo_trains_in_phases_saves_and_draws(tmp_path):
    output = tmp_path / 'new' / 'folder'
    command = [COMMAND, 'demo', '--output', output, '--epochs', '2', '--period', '1']
    result = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((output / 'summary.csv').open()))
    assert [row['train_phase'] for row in rows] == ['backbone', 'merge']
    assert 'Epoch  2/2,    merge phase' in result.stderr
    assert f"Held-out accuracy after the last epoch: {float(rows[-1]['eval_top1']):.1f} %" in result.stdout
    assert float(rows[-1]['eval_top1']) > 50  # chance is 10

    model = timm.create_model(f'local-dir:{output / "hub"}', pretrained=True).eval()
    assert tuple(model.pretrained_cfg['input_size']) == (1, 32, 32)
    assert any(m.weight2.any() for m in model.modules() if isinstance(m, MixingWeights))  # trained
    assert sorted(p.name for p in (output / 'hub').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    picture = Image.open(output / 'lambda-profile.png').convert('RGB')
    assert picture.width > 800 and len(picture.getcolors(2 ** 24)) > 50


def test_demo_changes_nothing_on_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('timm-awm-demo').mkdir()
    with pytest.raises(SystemExit, match='2'):
        main(['demo'])
    assert 'timm-awm-demo exists already: remove it, or choose another path' in capsys.readouterr().err
    assert main(['demo', '--output', 'new', '--period', '-1']) == 1
    assert 'period must be a whole number, at least 0, got -1' in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob('*')] == ['timm-awm-demo']


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
def test_a_stopped_demo_leaves_nothing(tmp_path):
    process = subprocess.Popen([COMMAND, 'demo', '--output', tmp_path / 'out'], env=ENV, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob('.out.*/out')):
        assert process.poll() is None
        time.sleep(.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert not list(tmp_path.iterdir())


def test_demo_names_the_missing_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    monkeypatch.delitem(sys.modules, 'timm_awm.demo', raising=False)
    monkeypatch.delattr(timm_awm, 'demo', raising=False)
    assert main(['demo']) == 1
    assert 'pip install ".[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['demo', '--epochs', '0'], 'must be at least 1, got 0'),
    ([], 'required: command'),
    (['models', '--epochs', '3'], 'unrecognized arguments: --epochs'),
])
def test_usage_errors(args, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('command', ['', *COMMANDS])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match='0'):
        main([*command.split(), '--help'])
    assert 'Example: timm-awm' in capsys.readouterr().out


def test_what_runs_no_network_imports_no_torch():
    code = """
import contextlib, os, sys
from timm_awm_cli.main import COMMANDS, main
os.execv = print
for command in ([], *([name] for name in COMMANDS)):
    with contextlib.suppress(SystemExit):
        main([*command, '--help'])
done = [main(['recipes']), main(['models']), main(['train', '-c', 'imagenet/awm_resnet50', '--script', sys.argv[1]])]
print('Loaded:', {'torch', 'timm', 'timm_awm'} & set(sys.modules), 'done:', done)"""
    output = subprocess.run([sys.executable, '-c', code, __file__], capture_output=True, text=True).stdout
    assert output.count('usage: timm-awm') == 1 + len(COMMANDS) and 'Loaded: set() done: [0, 0, 0]' in output


def test_a_console_that_is_not_utf_8():
    code = 'from timm_awm_cli import main, recipes; recipes.run = lambda args: print("λ, ä"); main.main(["recipes"])'
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, env={**ENV, 'PYTHONIOENCODING': 'cp1252'})
    assert result.stdout.split() == [rb'\u03bb,', 'ä'.encode('cp1252')], result.stderr


def test_models(capsys):
    assert main(['models']) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(timm.list_models('awm_*')) - {'awm_converted'}
    assert len({len(line) for line in (header, *lines)}) == 1  # aligned


@pytest.mark.parametrize('name', [
    'awm_resnet20_cifar', 'awm_densenet22_cifar', 'awm_resnet26d', 'awm_densenet121', 'awm_resnext50_32x4d'])
def test_the_table_of_models_counts_right(name, capsys):
    assert main(['models']) == 0
    with torch.device('meta'):
        model = timm.create_model(name).eval()
        image = torch.empty(1, *model.pretrained_cfg['input_size'])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    rows = map(str.split, capsys.readouterr().out.splitlines())
    size, *counts, gmacs = next(cells for listed, *cells in rows if listed == name)
    assert size == 'x'.join(map(str, image.shape[2:]))
    assert counts == [f'{n:,}' for n in count_parameters(model)]
    assert gmacs == f'{counter.get_total_flops() / 2e9:.3g}'


def test_recipes(capsys):
    folder = Path(__file__).parents[1] / 'recipes'
    assert main(['recipes']) == 0
    output = capsys.readouterr().out
    table, _, rest = output.partition('\n\n')
    listed = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert list(listed) == sorted(p.relative_to(folder).with_suffix('').as_posix() for p in folder.glob('*/*.yaml'))
    assert listed['imagenet/awm_resnet50'].startswith('ResNet-50, ImageNet-1k, alternating (t = 1)')
    assert 'recipes/NAME.yaml' in rest
    assert '  --opt adamw --model-kwargs awm=False --opt-kwargs   (finetune/awm_resnet50)\n' in rest
