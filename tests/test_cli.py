import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_awm
from timm_awm.layers import MixingWeights
from timm_awm_cli.main import COMMANDS, main

COMMAND = Path(sys.executable).with_name('timm-awm')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}  # the tests run side by side


def run(*args):
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, env=ENV)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp('demo') / 'new' / 'folder'
    return run('demo', '--output', output, '--epochs', 3, '--period', 1), output


def test_demo_trains_and_names_the_phase(demo):
    result, output = demo
    assert result.returncode == 0, result.stderr
    for epoch, phase in enumerate(('backbone', 'merge', 'backbone'), 1):
        assert f'Epoch  {epoch}/3, {phase:>8} phase' in result.stderr
    rows = list(csv.DictReader((output / 'summary.csv').open()))
    assert [row['train_phase'] for row in rows] == ['backbone', 'merge', 'backbone']
    assert f"Held-out accuracy after the last epoch: {float(rows[-1]['eval_top1']):.1f} %" in result.stdout
    assert float(rows[-1]['eval_top1']) > 50  # chance is 10


def test_demo_leaves_a_model_in_hub_format(demo):
    _, output = demo
    model = timm.create_model(f'local-dir:{output / "hub"}', pretrained=True).eval()
    assert tuple(model.pretrained_cfg['input_size']) == (1, 32, 32)
    assert any(m.weight2.any() for m in model.modules() if isinstance(m, MixingWeights))  # trained
    assert sorted(p.name for p in (output / 'hub').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    checkpoint = torch.load(output / 'checkpoints' / 'last.pth.tar', weights_only=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in checkpoint['state_dict'].items())


def test_demo_draws_the_profile(demo):
    _, output = demo
    picture = Image.open(output / 'lambda-profile.png').convert('RGB')
    assert picture.width > 800 and len(picture.getcolors(2 ** 24)) > 50


def test_demo_refuses_an_existing_folder(tmp_path):
    (tmp_path / 'mine').write_text('precious')
    result = run('demo', '--output', tmp_path)
    assert result.returncode == 1
    assert f'{tmp_path} exists already: remove it, or choose another folder with --output.' in result.stderr
    assert (tmp_path / 'mine').read_text() == 'precious'


@pytest.mark.parametrize('sent, code', [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_killed_demo_leaves_nothing_that_looks_complete(tmp_path, sent, code):
    output = tmp_path / 'out'
    process = subprocess.Popen(
        [COMMAND, 'demo', '--output', output], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background would ignore it
    while not list(tmp_path.glob('.out.*/out/checkpoints')):
        assert process.poll() is None
        time.sleep(.1)
    process.send_signal(sent)
    assert process.wait(60) == code
    assert not output.exists()
    if sent != signal.SIGKILL:  # which leaves no time to clean up: a hidden folder stays
        assert not list(tmp_path.iterdir())


def test_demo_names_the_missing_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    monkeypatch.delitem(sys.modules, 'timm_awm.demo', raising=False)
    monkeypatch.delattr(timm_awm, 'demo', raising=False)
    assert main(['demo']) == 1
    assert 'the demo needs sklearn.datasets: pip install ".[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (['demo', '--epochs', '0'], 'must be at least 1, got 0'),
    (['demo', '--epochs', 'many'], "invalid positive_int value: 'many'"),
    ([], 'required: command'),
    (['models', '--epochs', '3'], 'unrecognized arguments: --epochs'),
])
def test_usage_errors(args, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_period_leaves_nothing(tmp_path, capsys):
    assert main(['demo', '--output', str(tmp_path / 'out'), '--period', '-1']) == 1
    assert 'period must be a whole number, at least 0, got -1' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', [[], *([name] for name in COMMANDS)], ids=str)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match='0'):
        main([*command, '--help'])
    assert 'Example: timm-awm' in capsys.readouterr().out


def test_help_imports_neither_torch_nor_timm():
    code = (
        'import sys\nfrom timm_awm_cli.main import main\n'
        'try: main(["--help"])\nexcept SystemExit: sys.exit(bool({"torch", "timm", "timm_awm"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_console_that_is_not_utf_8():
    result = subprocess.run(
        [COMMAND, 'recipes', '--show', 'cifar10/awm_resnet20_cifar'], capture_output=True,
        env={**ENV, 'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'})
    assert result.returncode == 0 and b'model: awm_resnet20_cifar' in result.stdout


def test_models(capsys):
    assert main(['models', '*resnet20_cifar']) == 0
    assert '| awm_resnet20_cifar | 32x32 | 283,514 | 11,040 | 9 | 0.0408 |' in capsys.readouterr().out


def test_models_that_do_not_exist(capsys):
    assert main(['models', 'resnet5*']) == 1
    assert "No AWM model is called 'resnet5*'" in capsys.readouterr().err


def test_recipes(tmp_path, capsys):
    folder = Path(__file__).parents[1] / 'recipes'
    assert main(['recipes']) == 0
    listed = capsys.readouterr().out.split()
    assert listed == sorted(str(path.relative_to(folder).with_suffix('')) for path in folder.glob('*/*.yaml'))
    assert main(['recipes', 'imagenet/*_lamb']) == 0
    assert capsys.readouterr().out == 'imagenet/awm_resnet50_lamb\n'
    text = (folder / 'imagenet' / 'awm_resnet50_lamb.yaml').read_text()
    assert main(['recipes', '--show', 'imagenet/awm_resnet50_lamb']) == 0
    assert capsys.readouterr().out == text
    copy = tmp_path / 'mine.yaml'
    assert main(['recipes', '--copy', 'imagenet/awm_resnet50_lamb', str(copy)]) == 0
    assert copy.read_text() == text
    copy.write_text('precious')
    assert main(['recipes', '--copy', 'imagenet/awm_resnet50_lamb', str(copy)]) == 1
    assert copy.read_text() == 'precious' and 'File exists' in capsys.readouterr().err
    assert main(['recipes', 'imagnet/*']) == 1
    assert "No recipe is called 'imagnet/*'" in capsys.readouterr().err
