"""The recipes and the commands in their README: parsed by train.py, accepted by timm, cut as the authors cut."""
import copy
import importlib.util
import os
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import List, Optional, Tuple

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_awm.optim import PhaseSchedule
from timm_awm_cli.recipes import control_flags

ROOT = Path(__file__).parents[1] / 'recipes'
README = (ROOT / 'README.md').read_text(encoding='utf-8')
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')
TEXTS = {
    path.relative_to(ROOT).with_suffix('').as_posix(): path.read_text(encoding='utf-8')
    for path in sorted(ROOT.glob('*/*.yaml'))}
STARTS = {name: f'-c {name}' for name in TEXTS}
CONTROLS = {name: f'-c {name} {control_flags(text)}' for name, text in TEXTS.items()}
COMMANDS = re.findall(r'^(?:\|.*`)?timm-awm train (-c [^`\nR][^`\n]*)', README, re.M)  # not -c RECIPE


@pytest.fixture(scope='session')
def parse():
    """The arguments of train.py, by its own parser, for those of timm-awm train."""
    if not TRAIN:
        pytest.skip("NOT TESTED: recipes with timm's real train.py; set TIMM_TRAIN_SCRIPT to it")
    spec = importlib.util.spec_from_file_location('timm_train_script', TRAIN)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def parse(command: str) -> Namespace:
        parser = copy.deepcopy(script.parser)
        _, recipe, *flags = shlex.split(command)
        config = yaml.safe_load(TEXTS[recipe])
        for action in parser._actions:  # train.py takes what YAML holds, whatever the type
            if isinstance(value := config.get(action.dest), (int, float, str)) and action.type:
                assert type(value) is action.type, f'{recipe}: {action.dest}'
        assert config.keys() <= {action.dest for action in parser._actions}, f'{recipe} has keys that train.py ignores'
        parser.set_defaults(**config)
        return parser.parse_args(flags)

    return parse


def test_headers_name_their_recipes():
    for name, text in TEXTS.items():
        recipe = yaml.safe_load(text)
        assert len(re.findall(r'^\w+:', text, re.M)) == len(recipe), f'{name} has a key twice'
        assert recipe['device_modules'] == ['timm_awm'], name
        assert f'timm-awm train -c {name}\n' in text and f'python path/to/train.py -c recipes/{name}.yaml\n' in text
        assert len(text.splitlines()[0]) < 92, f'{name}: timm-awm recipes prints the first line'
    assert set(re.findall(r'\]\(([^)]*)\.yaml\)', README)) == set(TEXTS)
    assert all(re.search(rf'{re.escape(control_flags(text))}$', README, re.M) for text in TEXTS.values())


@pytest.mark.parametrize('name', TEXTS)
def test_a_control_differs_in_nothing_but_merges_and_alternation(name, parse):
    awm, control = vars(parse(STARTS[name])), vars(parse(CONTROLS[name]))
    assert {key for key in awm if awm[key] != control[key]} == {'opt', 'opt_kwargs', 'model_kwargs'}
    assert {'base': control['opt'], **control['opt_kwargs']}.items() <= awm['opt_kwargs'].items()
    assert (awm['model_kwargs'], control['model_kwargs']) == ({}, {'awm': False})


@pytest.mark.parametrize('command', [*STARTS.values(), *CONTROLS.values(), *COMMANDS])
def test_models_and_optimizers_are_accepted_by_timm(command, parse):
    args = parse(command)
    with torch.device('meta'):
        model = timm.create_model(args.model, **args.model_kwargs)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    if not args.opt_kwargs.get('filter_bias_and_bn', True):
        assert {group['weight_decay'] for group in optimizer.param_groups} == {args.weight_decay}


def test_there_are_commands_for_every_row_of_the_paper(parse):
    rows = {(args.model, args.num_classes) for args in map(parse, COMMANDS)}
    assert {(f'awm_resnet{n}_cifar', c) for n in (14, 20, 32, 44, 56, 110) for c in (10, 100)} <= rows
    assert {('awm_densenet22_cifar', 10), ('awm_resnet18', 1000), ('awm_resnet50', 1000)} <= rows


def authors_cuts(args: Namespace) -> Tuple[List[int], Optional[int]]:
    """The epochs of the backbone with which the rate is cut, in proportion to the authors' run; and t, None if every
    epoch is one of the backbone."""
    t = args.opt_kwargs.get('period') or 3  # plain and joint training have the rates of t = 3
    if args.num_classes == 1000:
        whole, cuts, t = 200, (30, 60, 90), 1
    elif args.epochs in (14, 165):  # the plain network's
        whole, cuts, t = 165, (80, 120), None
    elif args.epochs == 30:  # as many as the backbone has in 60
        whole, cuts, t = 350, (150, 250), None
    elif args.epochs == 24:
        whole, cuts = 24, (6, 9)
    else:
        whole, cuts = (900, (225, 337)) if 'densenet' in args.model else (700, (150, 250))
    return [round(cut * args.epochs / whole) for cut in cuts], t


@pytest.mark.parametrize('command', [  # the others are ours: the authors have no such rates
    command for command in (*STARTS.values(), *COMMANDS) if 'sched: multistep' in TEXTS[command.split()[1]]
    and 'cosine' not in command])
def test_the_rate_falls_where_the_authors_backbone_epochs_begin(command, parse):
    args = parse(command)
    cuts, t = authors_cuts(args)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    begun, rates, expected = 0, [], []
    for epoch in range(epochs):  # as train.py does
        begins = t is None or PhaseSchedule(t).phase(epoch) == 'backbone'
        # some runs of 24 epochs are cut in the merge phase before
        if begins or args.epochs != 24:
            rates.append(optimizer.param_groups[0]['lr'])
            expected.append(0.1 * 0.1 ** sum(begun - (not begins) >= cut for cut in cuts))
        begun += begins
        scheduler.step(epoch + 1)
    assert rates == pytest.approx(expected)
