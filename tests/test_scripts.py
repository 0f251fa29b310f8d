"""timm-awm train, validate and benchmark, with stand-ins for timm's scripts. The real ones: test_train_script.py."""
import functools
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from timm_awm import scripts
from timm_awm.hub.run import TrainingRun
from timm_awm.scripts import find_recipe, find_script
from timm_awm_cli.main import main

REPORT = '''\
# Copyright Ross Wightman
import json, sys
print(json.dumps(dict(argv=sys.argv, plugin='timm_awm' in sys.modules, name=__name__)))
sys.exit(7)
'''
WAIT = '''\
import sys, time
try:
    print('started', flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(9)
'''


@pytest.fixture
def clean(monkeypatch, tmp_path):
    monkeypatch.delenv('TIMM_TRAIN_SCRIPT', raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(path, text=REPORT):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def command(clean, monkeypatch):
    """What the command line of timm-awm becomes."""
    def command(*args):
        became = []
        monkeypatch.setattr(os, 'execv', lambda path, argv: became.append(argv[1:]))
        assert main(list(args)) == 0
        return became[0]

    return command


@pytest.mark.slow
def test_script_runs_with_plugin_arguments_and_exit_status(clean):
    path = script(clean / 'clone' / 'validate.py')
    command = [sys.executable, '-m', 'timm_awm', 'validate', '--script', path, '-b', '2']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 7, result.stderr
    assert json.loads(result.stdout) == dict(argv=[str(path), '-b', '2'], plugin=True, name='__main__')
    assert f'timm-awm runs {path} -b 2' in result.stderr


def test_arguments_pass_through(clean, command):
    script(clean / 'train.py')
    args = ['--epochs', '3', '-b', '16', '--opt-kwargs', 'base=sgd', 'period=1', 'data dir', '--crop-pct=.9', '-vb8']
    script(clean / 'other.py')
    assert command('train', *args[:4], '--script', 'other.py', *args[4:]) == [
        'other.py', *args, '--device-modules', 'timm_awm']
    assert command('train', '--', '--help')[:2] == ['train.py', '--help']
    assert command('train', '-b', '2', '--', 'data')[1:] == ['-b', '2', '--device-modules', 'timm_awm', '--', 'data']
    script(clean / 'benchmark.py')
    assert command('benchmark', '--model', 'x', '-c')[2:] == ['benchmark.py', '--model', 'x', '-c']


def test_modules_and_recipe_of_train(clean, command):
    script(clean / 'train.py')
    name = 'cifar10/awm_resnet20_cifar'
    assert command('train', '-c', name, '--device-modules', 'json', 'timm_awm') == [
        'train.py', '-c', str(find_recipe(name)), '--device-modules', 'timm_awm', 'json']
    (clean / 'mine.yaml').write_text('device_modules: [json]\nepochs: 1\n')
    assert command('train', '--config', 'mine.yaml') == [
        'train.py', '-c', 'mine.yaml', '--device-modules', 'timm_awm', 'json']


@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX signals')
def test_signals_reach_the_script(clean):
    path = script(clean / 'train.py', WAIT)
    started = [sys.executable, '-m', 'timm_awm', 'train', '--script', path]
    # a shell gives its background jobs an ignored SIGINT, which would be inherited
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, preexec_fn=functools.partial(
            signal.signal, signal.SIGINT, signal.default_int_handler)) as process:
        assert process.stdout.readline() == 'started\n'
        process.send_signal(signal.SIGINT)
        assert process.wait() == 9


def test_where_scripts_are_looked_for(clean, monkeypatch):
    monkeypatch.setattr(scripts, '_cached_script', lambda name: f'cached {name}')
    assert find_script('train') == 'cached train'
    script(clean / 'train.py', 'from timm import create_model  # a script of the user')
    assert find_script('train') == 'cached train'
    script(clean / 'train.py')
    script(clean / 'validate.py')
    assert (find_script('train'), find_script('validate')) == (Path('train.py'), Path('validate.py'))
    clone = clean / 'clone'
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(script(clone / 'train.py')))
    script(clone / 'validate.py')
    assert (find_script('train'), find_script('validate')) == (clone / 'train.py', clone / 'validate.py')
    assert find_script('benchmark') == 'cached benchmark'
    (clone / 'train.py').rename(clone / 'moved.py')
    with pytest.raises(FileNotFoundError, match='TIMM_TRAIN_SCRIPT leads to .*train.py.*no file'):
        find_script('benchmark')
    assert find_script('train', str(clean / 'train.py')) == clean / 'train.py'
    with pytest.raises(FileNotFoundError, match='--script leads to .*no file; name train.py in a clone of timm'):
        find_script('train', str(clean / 'trian.py'))


@pytest.fixture
def published(clean, monkeypatch):
    """A train.py at a tag, on a server of our own."""
    content = b'# from timm'
    page = clean / 'www' / 'v9.8.7' / 'train.py'
    page.parent.mkdir(parents=True)
    page.write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clean / 'www'))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(scripts, 'URL', f'http://127.0.0.1:{server.server_port}/v{{version}}/{{name}}.py')
    monkeypatch.setattr(scripts, 'DIGESTS', dict(train=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(scripts, 'VERSION', '9.8.7')
    monkeypatch.setattr(scripts, 'version', lambda name: '9.8.7')
    yield page
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_kept(published, monkeypatch, capsys):
    path = find_script('train')
    assert path.read_bytes() == published.read_bytes() and 'v9.8.7/train.py' in capsys.readouterr().err
    content = published.read_bytes()
    published.unlink()
    assert find_script('train') == path
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(scripts, 'version', lambda name: '9.9.0')
    assert find_script('train') == path
    assert 'takes train.py of timm 9.8.7, the newest that it was tested with, for timm 9.9.0' in capsys.readouterr().err
    path.write_bytes(b'damaged')
    with pytest.raises(RuntimeError, match='Cannot get.*404.*Clone timm at the tag v9.8.7'):
        find_script('train')
    path.unlink()
    published.write_bytes(content + b', altered')
    with pytest.raises(RuntimeError, match='Cannot get.*hash.*--script or TIMM_TRAIN_SCRIPT'):
        find_script('train')
    assert not [path for path in Path(torch.hub.get_dir()).rglob('*') if path.is_file()]


def test_recipe_names():
    assert find_recipe('cifar10/awm_resnet20_cifar.yaml') == find_recipe('cifar10/awm_resnet20_cifar')
    with pytest.raises(FileNotFoundError, match="'data' is neither a file nor a recipe; timm-awm recipes"):
        find_recipe('data')
    with pytest.raises(FileNotFoundError, match="nearest is 'cifar10/awm_resnet20_cifar'; timm-awm recipes lists"):
        find_recipe('cifar10/awm_resnet20_cifr')


def save(path):
    torch.save(dict(x=torch.arange(9999)), path)
    return path


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, bit):
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def test_newest_whole_checkpoint(tmp_path):
    run = TrainingRun(tmp_path)
    assert TrainingRun(tmp_path / 'new').last_checkpoint() is None
    tmp = save(tmp_path / 'tmp.pth.tar')
    cut(tmp)  # killed in the first save
    assert run.last_checkpoint() is None
    save(tmp_path / 'checkpoint-9.pth.tar')
    old = save(tmp_path / 'checkpoint-10.pth.tar')
    save(tmp_path / 'recovery-11-4.pth.tar')
    assert run.last_checkpoint() == old
    last = save(tmp_path / 'last.pth.tar')
    assert run.last_checkpoint() == last
    save(tmp)  # killed before it took the place of the last
    assert run.last_checkpoint() == tmp
    cut(tmp)
    assert run.last_checkpoint() == last
    flip(last, 8 * (last.stat().st_size // 2))
    assert run.last_checkpoint() == old
    cut(old)
    cut(tmp_path / 'checkpoint-9.pth.tar')
    with pytest.raises(ValueError, match='Every checkpoint in .* is damaged: move it away'):
        run.last_checkpoint()


def test_resume_auto(clean, command, capsys):
    script(clean / 'train.py')
    args = ('train', '--output', 'out', '--experiment', 'x', '--resume', 'auto')
    run_in_folder = ['--output', 'out', '--experiment', 'x']
    assert command(*args)[1:-2] == [*run_in_folder, '--resume', '']
    assert 'no checkpoint to resume from' in capsys.readouterr().err
    (clean / 'out' / 'x').mkdir(parents=True)
    save(clean / 'out' / 'x' / 'last.pth.tar')
    assert command(*args)[1:-2] == [*run_in_folder, '--resume', 'out/x/last.pth.tar']
    (clean / 'mine.yaml').write_text('output: out\nexperiment: x\nresume: auto')
    assert command('train', '-c', 'mine.yaml')[3:-2] == ['--resume', 'out/x/last.pth.tar']
    assert command('train', '-c', 'mine.yaml', '--resume', '', '--output', '')[3:-2] == ['--output', '', '--resume', '']
    assert command('train', '--resume', 'some.pth.tar')[1:-2] == ['--resume', 'some.pth.tar']
    assert main(['train', '--resume', 'auto']) == 1
    assert '--resume auto needs --experiment NAME' in capsys.readouterr().err
    assert main([*args, '--start-epoch=3']) == 1
    assert 'leave --start-epoch out' in capsys.readouterr().err


@pytest.mark.parametrize('text, message', [('- a', 'must hold names and values'), ('a: b: c', 'is no YAML file')])
def test_bad_config(text, message, clean, capsys):
    script(clean / 'train.py')
    (clean / 'mine.yaml').write_text(text)
    assert main(['train', '-c', 'mine.yaml']) == 1
    assert f'mine.yaml {message}' in capsys.readouterr().err
