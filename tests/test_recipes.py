"""The recipes and the commands in their README: spelt as train.py has it, accepted by timm, cut as the authors cut."""
import argparse
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

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

    def kind(action):
        if isinstance(action, argparse._StoreTrueAction):
            return 'bool'
        if isinstance(action, ParseKwargs):
            return 'dict'
        return 'list of ' * (action.nargs not in (None, '?')) + (action.type or str).__name__

    assert {action.dest: kind(action) for action in script.parser._actions if action.dest in FLAGS} == FLAGS


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


def run_of(command: str) -> Dict[str, Any]:
    """The keys of a command's recipe, with what its flags override; and the name of the recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument('-c', dest='recipe')
    for flag, kind in FLAGS.items():
        options: Dict[str, Any] = dict(type=dict(int=int, float=float).get(kind.split()[-1], str))
        if kind == 'bool':
            options = dict(action='store_true')
        elif kind == 'dict':
            options = dict(nargs='*', action=ParseKwargs)
        elif kind.startswith('list'):
            options['nargs'] = '+'
        parser.add_argument(f'--{flag.replace("_", "-")}', default=argparse.SUPPRESS, **options)
    args = vars(parser.parse_args(shlex.split(command)))
    return {**RECIPES[args['recipe']], **args}


RUNS = {command: run_of(command) for command in [*(f'-c {name}' for name in RECIPES), *COMMANDS]}
# as README says how a row's control is made
CONTROLS = {
    command: run_of(re.sub(r' --opt-kwargs( \w+=\S+)*', '', command).replace(run['recipe'], f'{run["recipe"]}_plain'))
    for command, run in RUNS.items() if run['opt'] == 'alternating' and 'merges' not in command}


def test_models_and_optimizers_are_accepted_by_timm():
    for run in [*RUNS.values(), *CONTROLS.values()]:
        args = argparse.Namespace(**{'momentum': 0.9, **run})
        with torch.device('meta'):
            model = timm.create_model(run['model'], **run.get('model_kwargs', {}))
        options = run.get('opt_kwargs', {})
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **options)
        if not options.get('filter_bias_and_bn', True):
            decayed = {run['weight_decay'], options.get('merge_weight_decay', run['weight_decay'])}
            assert {group['weight_decay'] for group in optimizer.param_groups} == decayed, run


def test_there_are_commands_for_every_row_of_the_paper_and_every_run_that_is_kept():
    rows = {(RUNS[command]['model'], RUNS[command]['num_classes']) for command in COMMANDS}
    assert {(f'awm_resnet{n}_cifar', c) for n in (14, 20, 32, 44, 56, 110) for c in (10, 100)} <= rows
    assert {(f'awm_densenet{n}_cifar', 10) for n in (22, 28, 34, 40)} <= rows
    assert {('awm_resnet18', 1000), ('awm_resnet50', 1000)} <= rows

    def settings(run):
        return {key: value for key, value in run.items() if key not in ('seed', 'dataset')}

    commands = [settings(RUNS[command]) for command in COMMANDS]
    for path in ROOT.parent.glob('hub/results/*/run.json'):
        kept = json.loads(path.read_text(encoding='utf-8'))
        recipe = kept['recipe']
        assert settings({**RECIPES[recipe], **kept['overrides'], 'recipe': recipe}) in commands, path


def authors_cuts(run: Dict[str, Any]) -> Tuple[List[int], Optional[int]]:
    """The epochs of the backbone with which the rate is cut, in proportion to the authors' run; and t, None if every
    pass is such an epoch."""
    passes, plain = run['epochs'], 'awm' in run.get('model_kwargs', {})
    t = run.get('opt_kwargs', {}).get('period') or 3  # plain and joint training have the rates of t = 3
    if run['num_classes'] == 1000:
        whole, cuts, t = (100, (30, 60, 90), None) if plain and passes == 100 else (200, (30, 60, 90), 1)
    elif passes in (14, 165):  # the plain network's
        whole, cuts, t = 165, (80, 120), None
    elif passes == 30:  # as many as the backbone has in 60
        whole, cuts, t = 350, (150, 250), None
    elif passes == 24:
        whole, cuts = 24, (6, 9)
    else:
        whole, cuts = (900, (225, 337)) if 'densenet' in run['model'] else (700, (150, 250))
    return [round(cut * passes / whole) for cut in cuts], t


@pytest.mark.parametrize('command', [command for command, run in RUNS.items() if run['sched'] == 'multistep'])
def test_the_rate_falls_where_the_authors_backbone_epochs_begin(command):
    run = RUNS[command]
    cuts, t = authors_cuts(run)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run['lr'])
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(argparse.Namespace(**run)))
    begun, rates, expected = 0, [], []
    for epoch in range(epochs):  # as train.py does
        begins = t is None or PhaseSchedule(t).phase(epoch) == 'backbone'
        # some runs of 24 passes are cut in the merge phase before
        if begins or run['epochs'] != 24:
            rates.append(optimizer.param_groups[0]['lr'])
            expected.append(0.1 * 0.1 ** sum(begun - (not begins) >= cut for cut in cuts))
        begun += begins
        scheduler.step(epoch + 1)
    assert rates == pytest.approx(expected)
