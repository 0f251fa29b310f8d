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

import timm_awm
from timm_awm.layers import MixingWeights
from timm_awm_cli.main import COMMANDS, main

COMMAND = Path(sysconfig.get_path('scripts'), 'timm-awm')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}  # the tests run side by side


@pytest.mark.slow
def test_demo_trains_in_phases_saves_and_draws(tmp_path):
    output = tmp_path / 'new' / 'folder'
    command = [COMMAND, 'demo', '--output', output, '--epochs', '3', '--period', '1']
    result = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((output / 'summary.csv').open()))
    assert [row['train_phase'] for row in rows] == ['backbone', 'merge', 'backbone']
    assert 'Epoch  2/3,    merge phase' in result.stderr
    assert f"Held-out accuracy after the last epoch: {float(rows[-1]['eval_top1']):.1f} %" in result.stdout
    assert float(rows[-1]['eval_top1']) > 50  # chance is 10

    model = timm.create_model(f'local-dir:{output / "hub"}', pretrained=True).eval()
    assert tuple(model.pretrained_cfg['input_size']) == (1, 32, 32)
    assert any(m.weight2.any() for m in model.modules() if isinstance(m, MixingWeights))  # trained
    assert sorted(p.name for p in (output / 'hub').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    checkpoint = torch.load(output / 'checkpoints' / 'last.pth.tar', weights_only=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in checkpoint['state_dict'].items())

    picture = Image.open(output / 'lambda-profile.png').convert('RGB')
    assert picture.width > 800 and len(picture.getcolors(2 ** 24)) > 50


@pytest.mark.parametrize('args, message', [
    ([], 'exists already: remove it, or choose another folder with --output.'),
    (['--output', 'new', '--period', '-1'], 'period must be a whole number, at least 0, got -1'),
])
def test_demo_changes_nothing_on_an_error(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('timm-awm-demo').mkdir()
    assert main(['demo', *args]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob('*')] == ['timm-awm-demo']


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
@pytest.mark.parametrize('sent, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_demo_leaves_nothing(tmp_path, sent, code):
    output = tmp_path / 'out'
    process = subprocess.Popen(
        [COMMAND, 'demo', '--output', output], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background would ignore it
    while not list(tmp_path.glob('.out.*/out/checkpoints')):
        assert process.poll() is None
        time.sleep(.1)
    process.send_signal(sent)
    assert process.wait() == code
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
@pytest.mark.parametrize('sent, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_destructor_is_not_lost(sent, code, monkeypatch):
    class Gone:
        def __del__(self):
            signal.raise_signal(sent)  # Python ignores what the handler raises here

    def run(args):
        Gone()
        time.sleep(20)

    monkeypatch.setattr('timm_awm_cli.models.run', run)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    try:
        with pytest.raises(SystemExit, match=str(code)):
            sys.exit(main(['models']))
    finally:
        signal.signal(signal.SIGINT, previous)


def test_demo_names_the_missing_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    monkeypatch.delitem(sys.modules, 'timm_awm.demo', raising=False)
    monkeypatch.delattr(timm_awm, 'demo', raising=False)
    assert main(['demo']) == 1
    assert 'the demo needs sklearn.datasets: pip install ".[demo]"' in capsys.readouterr().err


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


def test_help_of_every_command_imports_neither_torch_nor_timm():
    code = """
import contextlib, sys
from timm_awm_cli.main import COMMANDS, main
for command in ([], *([name] for name in COMMANDS)):
    with contextlib.suppress(SystemExit):
        main([*command, '--help'])
print('Loaded:', {'torch', 'timm', 'timm_awm'} & set(sys.modules))"""
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert output.count('usage: timm-awm') == 1 + len(COMMANDS) and 'Loaded: set()' in output


def test_a_console_that_is_not_utf_8():
    code = 'from timm_awm_cli import main, recipes; recipes.run = lambda args: print("λ, ä"); main.main(["recipes"])'
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, env={**ENV, 'PYTHONIOENCODING': 'cp1252'})
    assert result.stdout.split() == [rb'\u03bb,', 'ä'.encode('cp1252')], result.stderr


def test_models(capsys):
    assert main(['models', '*resnet20_cifar']) == 0
    assert '| awm_resnet20_cifar | 32x32 | 283,514 | 11,040 | 9 | 0.0408 |' in capsys.readouterr().out
    assert main(['models', 'resnet5*']) == 1
    assert "No AWM model is called 'resnet5*'" in capsys.readouterr().err


def test_recipes(tmp_path, capsys):
    folder = Path(__file__).parents[1] / 'recipes'
    assert main(['recipes']) == 0
    listed = capsys.readouterr().out.split()
    assert listed == sorted(path.relative_to(folder).with_suffix('').as_posix() for path in folder.glob('*/*.yaml'))
    name, copy = 'imagenet/awm_resnet50_lamb', tmp_path / 'mine.yaml'
    text = (folder / f'{name}.yaml').read_text()
    assert main(['recipes', '--show', name]) == 0 and capsys.readouterr().out == text
    assert main(['recipes', '--copy', name, str(copy)]) == 0 and copy.read_text() == text
    copy.write_text('precious')
    assert main(['recipes', '--copy', name, str(copy)]) == 1
    assert 'File exists' in capsys.readouterr().err and copy.read_text() == 'precious'
    assert main(['recipes', 'imagnet/*']) == 1
    assert "No recipe is called 'imagnet/*'" in capsys.readouterr().err
