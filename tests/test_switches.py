"""The epoch clock and the freezing under every switch of timm's real train.py."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import create
from PIL import Image
from switches import BATCHES, COMMON, TABLE, check
from timm.models import save_for_hf

HERE = Path(__file__).parent
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not TRAIN, reason="NOT TESTED: timm's real train.py under every switch. Clone timm at the tag of the installed "
                      'version and set TIMM_TRAIN_SCRIPT to its train.py')]


@pytest.fixture(scope='module')
def parser():
    spec = importlib.util.spec_from_file_location('timm_train_script', TRAIN)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.parser


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images, and networks that are past the identity start, where a merge's W1 has no gradient yet."""
    folder = tmp_path_factory.mktemp('switches')
    torch.manual_seed(0)
    for split, size in (('train', BATCHES * 8), ('validation', 8)):
        for i, image in enumerate(torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8)):
            path = folder / split / str(i % 10) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    for name in ('awm_resnet14_cifar', 'awm_densenet22_cifar'):
        save_for_hf(create(name, away=True), folder / name, safe_serialization=True)
    return folder


def run(argv, cwd):
    record = cwd / 'notes'
    record.unlink(missing_ok=True)
    env = {
        **os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'TIMM_AWM_RECORD': str(record),
        'PYTHONPATH': os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])}
    result = subprocess.run(
        [sys.executable, TRAIN, '--device-modules', 'timm_awm', 'recorder', *argv],
        cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return list(map(json.loads, record.read_text().splitlines()))


@pytest.mark.parametrize('row', TABLE, ids=lambda row: row.name)
def test_train_script(row, parser, folder, tmp_path):
    argv = f'{COMMON} --data-dir {folder} --output {tmp_path} {row.args}'.format(data=folder).split()
    if not row.identity:
        argv += ['--initial-checkpoint', str(folder / parser.parse_args(argv).model / 'model.safetensors')]
    check(run(argv, tmp_path), row, parser.parse_args(argv))
    if row.again:
        argv += f'{row.again} --experiment again'.format(run=tmp_path / 'run').split()
        check(run(argv, tmp_path), row, parser.parse_args(argv), again=True)
