"""Several processes on one machine, by torchrun."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name('distributed_worker.py')


def torchrun(processes, *args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    result = subprocess.run([*command, *map(str, args)], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize('accumulate, clip', [(1, 'none'), (2, 'norm'), (2, 'value'), (1, 'agc')])
def test_two_processes_train_like_one_and_stay_equal(accumulate, clip, tmp_path):
    results = []
    for processes in (1, 2):
        torchrun(processes, WORKER, tmp_path / 'result', accumulate, clip)
        results.append(torch.load(tmp_path / 'result', weights_only=True))
    one, two = (result['parameters'] for result in results)
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
    one, two = (result['flops'] for result in results)
    for phase in ('backbone', 'merge'):  # what is frozen costs nothing in two processes either
        assert two[phase] == one[phase] / 2
    assert two['merge'] < .7 * two['backbone']
