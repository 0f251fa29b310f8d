"""The pages' Python runs as it stands there; the notebook keeps its outputs."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / 'docs'
NEEDS = {'Accelerate': 'accelerate', 'Lightning': 'lightning', "transformers' Trainer": 'transformers'}


def snippets(page):
    """Heading -> the Python below it, '' being what stands before all headings."""
    parts = re.split(r'^## (.*)$', (DOCS / page).read_text(encoding='utf-8'), flags=re.M)
    parts = dict(zip(['', *parts[1::2]], parts[::2]))
    return {heading: '\n'.join(re.findall(r'```python\n(.*?)```', text, re.S)) for heading, text in parts.items()}


LOOPS = snippets('own-loops.md')
DDP = 'Several processes: DDP'


@pytest.mark.parametrize('heading', [heading for heading, code in LOOPS.items() if code and heading not in ('', DDP)])
def test_each_loop_trains_both_sides(heading, tmp_path, monkeypatch):
    if heading in NEEDS:
        pytest.importorskip(NEEDS[heading])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(LOOPS[''], names)
    before = {name: p.clone() for name, p in names['model'].named_parameters()}
    exec(LOOPS[heading], names)
    if 'own' not in heading:  # there the model is another one
        for name, p in names['model'].named_parameters():
            assert not torch.equal(p.detach().cpu(), before[name]), name
    assert [group['epoch'] for group in names['optimizer'].param_groups] == [1] * len(names['optimizer'].param_groups)


@pytest.mark.slow
def test_the_loop_with_ddp_keeps_processes_equal(tmp_path):
    script = tmp_path / 'loop.py'
    code = LOOPS[''] + LOOPS[DDP].replace('torch.distributed.destroy_process_group()', '') + '''
own = torch.cat([p.detach().flatten() for p in model.parameters()])
all_of_them = [torch.empty_like(own) for _ in range(2)]
torch.distributed.all_gather(all_of_them, own)
assert torch.equal(*all_of_them)
assert all(p.any() for p in timm_awm.layers.merge_parameters())          # W2 has left its zero
torch.distributed.destroy_process_group()
'''
    script.write_text(code, encoding='utf-8')
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', script],
                   check=True, timeout=600)


def test_the_page_about_features_runs():
    code = snippets('look-inside.md')
    names = {}
    exec(code['Features'] + code['Mixing weights'], names)
    torch.testing.assert_close(names['lambdas']['layer1.0.merge'].sum(1), torch.ones(2))


def test_the_notebook_keeps_its_outputs():
    cells = json.loads((DOCS / 'tour.ipynb').read_text(encoding='utf-8'))['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', ())]
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 2
