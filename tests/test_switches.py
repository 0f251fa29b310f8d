"""Epochs and freezing under the switches of timm's real train.py."""
import gc
import importlib.util
import os
import sys

import pytest
import timm
import torch
from networks import create
from PIL import Image
from recorder import Recorder
from switches import BATCHES, COMMON, TABLE, check
from timm.data import transforms_factory
from timm.models import save_for_hf

from timm_awm import train_script

TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')

pytestmark = pytest.mark.skipif(
    not TRAIN, reason="NOT TESTED: timm's real train.py under its switches. Clone timm at the tag of the installed "
                      'version and set TIMM_TRAIN_SCRIPT to its train.py')


@pytest.fixture(scope='module')
def train_py():
    """timm's train.py as the running script, in this process."""
    spec = importlib.util.spec_from_file_location('train_py', TRAIN)
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, '__main__', script)
        patch.setattr(transforms_factory, 'transforms_imagenet_train', transforms_factory.transforms_imagenet_train)
        for task in vars(timm.task).values():
            if 'prepare_distributed' in getattr(task, '__dict__', ()):
                patch.setattr(task, 'prepare_distributed', task.prepare_distributed)
        spec.loader.exec_module(script)
        train_script.install()
        yield script


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


def train(train_py, row, folder, output, again=False):
    """Notes and arguments of a row's first or second run."""
    argv = f'{COMMON} --data-dir {folder} --output {output} {row.args}'.format(data=folder).split()
    argv += ['--initial-checkpoint', str(folder / train_py.parser.parse_args(argv).model / 'model.safetensors')]
    if again:
        argv += f'{row.again} --experiment again'.format(run=output / 'run').split()
    notes = []
    gc.collect()  # optimizers of earlier runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', *argv])
        patch.setattr(train_py, 'train_one_epoch', Recorder(train_py.train_one_epoch, notes.append))
        train_py.main()
    torch._dynamo.reset()
    return notes, train_py.parser.parse_args(argv)


@pytest.mark.parametrize('row', [
    pytest.param(row, id=row.name, marks=pytest.mark.slow if row.slow else ()) for row in TABLE])
def test_every_update(row, train_py, folder, tmp_path):
    for again in [False, True] if row.again else [False]:
        notes, args = train(train_py, row, folder, tmp_path, again)
        check(notes, row, args, again)
