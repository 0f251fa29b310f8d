"""The recipes and the commands in their README: spelt as train.py has it, accepted by timm, cut as the authors cut."""
import argparse
import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs

from timm_awm.optim import PhaseSchedule

ROOT = Path(__file__).parents[1] / 'recipes'
README = (ROOT / 'README.md').read_text(encoding='utf-8')
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')
TEXTS = {
    path.relative_to(ROOT).with_suffix('').as_posix(): path.read_text(encoding='utf-8')
    for path in sorted(ROOT.glob('*/*.yaml'))}
RECIPES: Dict[str, Dict[str, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
AWM = [name for name, recipe in RECIPES.items() if recipe['opt'] == 'alternating']
COMMANDS = re.findall(r'^(?:\|.*`)?timm-awm train (-c [^`\n]*)', README, re.M)

# the flags of train.py that recipes and commands use, by the type of their value
FLAGS = {flag: kind for kind, flags in {
    'str': '''
        dataset train_split val_split input_key target_key model amp_dtype opt sched train_crop_mode aa interpolation
        train_interpolation''',
    'int': 'num_classes batch_size grad_accum_steps epochs warmup_epochs seed',
    'bool': 'pretrained channels_last amp bce_loss model_ema',
    'list of int': 'decay_milestones',
    'float': '''
        crop_pct momentum weight_decay lr warmup_lr min_lr decay_rate hflip color_jitter mixup cutmix smoothing
        model_ema_decay''',
    'dict': 'model_kwargs opt_kwargs',
    'list of str': 'device_modules',
}.items() for flag in flags.split()}


def kind_of(value: Any) -> str:
    if isinstance(value, list):
        return f'list of {" or ".join({kind_of(item) for item in value})}'
    return type(value).__name__


def test_every_key_is_a_flag_of_train_py_and_has_its_type():
    wrong = [
        f'{name}: {key}: {value!r} ({kind_of(value)}, the flag: {FLAGS.get(key, "unknown")})'
        for name, recipe in RECIPES.items() for key, value in recipe.items()
        if FLAGS.get(key) != kind_of(value) and (key, value) != ('color_jitter', None)]
    assert not wrong, '\n'.join(wrong)


@pytest.mark.skipif(not TRAIN, reason="NOT TESTED: the flags of timm's real train.py; set TIMM_TRAIN_SCRIPT to it")
def test_the_flags_are_those_of_the_real_train_py():
    spec = importlib.util.spec_from_file_location('timm_train_script', TRAIN)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    real = {}
    for action in script.parser._actions:
        if isinstance(action, argparse._StoreTrueAction):
            kind = 'bool'
        elif isinstance(action, ParseKwargs):
            kind = 'dict'
        else:
            kind = (action.type or str).__name__
            kind = kind if action.nargs in (None, '?') else f'list of {kind}'
        real[action.dest] = kind
    assert {key: real.get(key) for key in FLAGS} == FLAGS


def test_no_key_stands_twice_and_every_header_names_its_recipe():
    for name, text in TEXTS.items():
        assert len(re.findall(r'^\w+:', text, re.M)) == len(RECIPES[name]), name
        assert RECIPES[name]['device_modules'] == ['timm_awm'], name
        assert f'timm-awm train -c {name}\n' in text and f'python path/to/train.py -c recipes/{name}.yaml\n' in text
        for file in re.findall(r'[\w/]+\.yaml', text.replace(f'recipes/{name}.yaml', '')):
            assert (ROOT / name).with_name(file).is_file(), f'{name} names {file}'
    assert set(re.findall(r'\]\(([^)]*)\.yaml\)', README)) == set(AWM)


@pytest.mark.parametrize('name', AWM)
def test_a_control_differs_in_nothing_but_merges_and_alternation(name):
    merges_alone = name.endswith('_merges')
    control_name = name.removesuffix('_merges') + '_plain'
    awm, control = RECIPES[name], RECIPES[control_name]

    def rest(recipe):
        turns = ('base', 'period', 'merge_period', 'train')
        options = {k: v for k, v in recipe.get('opt_kwargs', {}).items() if k not in turns}
        own = ('model_kwargs', 'opt', 'lr') if merges_alone else ('model_kwargs', 'opt')  # what is trained starts anew
        return {**{k: v for k, v in recipe.items() if k not in own}, 'opt_kwargs': options}

    assert rest(awm) == rest(control)
    assert awm['opt_kwargs']['base'] == control['opt']
    assert 'model_kwargs' not in awm and control['model_kwargs'] == {'awm': False}
    assert f'{control_name.rpartition("/")[2]}.yaml' in TEXTS[name]
    if merges_alone:
        assert awm['lr'] == pytest.approx(10 * control['lr'])
        assert 'a tenth of the learning rate' in ' '.join(TEXTS[name].replace('\n#', ' ').split())


def run_of(command: str) -> Tuple[str, Dict[str, Any]]:
    """The recipe of a command, and its keys with what the flags of the command override."""
    parser = argparse.ArgumentParser()
    parser.add_argument('-c', dest='recipe')
    for flag, kind in FLAGS.items():
        names = [f'--{flag.replace("_", "-")}']
        if kind == 'bool':
            parser.add_argument(*names, dest=flag, action='store_true', default=None)
        elif kind == 'dict':
            parser.add_argument(*names, dest=flag, nargs='*', action=ParseKwargs)
        else:
            one = dict(int=int, float=float, str=str)[kind.split()[-1]]
            parser.add_argument(*names, dest=flag, type=one, nargs='+' if kind.startswith('list') else None)
    args = vars(parser.parse_args(shlex.split(command)))
    recipe = args.pop('recipe')
    return recipe, {**RECIPES[recipe], **{k: v for k, v in args.items() if v is not None}}


RUNS = {**{name: (name, recipe) for name, recipe in RECIPES.items()}, **{c: run_of(c) for c in COMMANDS}}


def test_models_and_optimizers_are_accepted_by_timm():
    for title, (_, run) in RUNS.items():
        args = argparse.Namespace(**{
            key: run.get(key, default)
            for key, default in dict(opt='sgd', lr=0.1, weight_decay=2e-5, momentum=0.9).items()})
        with torch.device('meta'):
            model = timm.create_model(run['model'], **run.get('model_kwargs', {}))
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **run.get('opt_kwargs', {}))
        if not run.get('opt_kwargs', {}).get('filter_bias_and_bn', True):
            assert {group['weight_decay'] for group in optimizer.param_groups} == {run['weight_decay']}, title


class Authors(NamedTuple):
    """The authors' passes; the rate is cut when these epochs of the backbone begin; t None: every pass is one."""
    passes: int
    cuts: Tuple[int, ...]
    t: Optional[int]


def authors_schedule(recipe: str, run: Dict[str, Any]) -> Authors:
    """That of a run of as many passes, in proportion."""
    plain, passes = recipe.endswith('_plain'), run['epochs']
    if recipe.startswith('imagenet/'):
        return Authors(100, (30, 60, 90), None) if plain and passes == 100 else Authors(200, (30, 60, 90), 1)
    if plain and passes in (14, 165):
        return Authors(165, (80, 120), None)
    if plain and passes == 30:  # as many as the backbone has in 60
        return Authors(350, (150, 250), None)
    t = run.get('opt_kwargs', {}).get('period') or 3  # plain and joint training have the rates of t = 3
    if passes == 24:
        return Authors(24, (6, 9), t)
    return Authors(900, (225, 337), t) if 'densenet' in run['model'] else Authors(700, (150, 250), t)


def begun(passes: int, t: Optional[int]) -> List[int]:
    """The backbone epoch that has last begun, for every pass."""
    result, count = [], 0
    for i in range(passes):
        count += t is None or PhaseSchedule(t).phase(i) == 'backbone'
        result.append(count - 1)
    return result


def test_there_are_commands_for_every_row_of_the_paper():
    rows = {(run['model'], run['num_classes']) for command, (_, run) in RUNS.items() if command in COMMANDS}
    assert {(f'awm_resnet{n}_cifar', c) for n in (14, 20, 32, 44, 56, 110) for c in (10, 100)} <= rows
    assert {(f'awm_densenet{n}_cifar', 10) for n in (22, 28, 34, 40)} <= rows
    assert {('awm_resnet18', 1000), ('awm_resnet50', 1000)} <= rows


@pytest.mark.parametrize('title', [title for title, (_, run) in RUNS.items() if run['sched'] == 'multistep'])
def test_the_rate_falls_where_the_authors_backbone_epochs_begin(title):
    recipe, run = RUNS[title]
    authors = authors_schedule(recipe, run)
    cuts = [round(cut * run['epochs'] / authors.passes) for cut in authors.cuts]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run['lr'])
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(argparse.Namespace(**run)))
    rates = []
    for epoch in range(epochs):  # as train.py does
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    epochs_begun = begun(run['epochs'], authors.t)
    expected = [0.1 * 0.1 ** sum(b >= cut for cut in cuts) for b in epochs_begun]
    if run['epochs'] == 24:  # some are cut in the merge phase before
        new = [i for i in range(24) if i == 0 or epochs_begun[i] > epochs_begun[i - 1]]
        rates, expected = [rates[i] for i in new], [expected[i] for i in new]
    assert rates == pytest.approx(expected)
