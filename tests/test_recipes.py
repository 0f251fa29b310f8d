"""The recipes: current, spelt as train.py has it, accepted by timm, and cut where the authors cut."""
import argparse
import functools
import importlib.util
import json
import os
import re
import runpy
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
TRAIN = os.environ.get('TIMM_TRAIN_SCRIPT', '')
TEXTS = {path.relative_to(ROOT).with_suffix('').as_posix(): path.read_text() for path in sorted(ROOT.glob('*/*.yaml'))}
RECIPES: Dict[str, Dict[str, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
AWM = [name for name, recipe in RECIPES.items() if recipe['opt'] == 'alternating']

# every flag of the train.py of timm 1.0.28 by the type of its value
FLAGS = {flag: kind for kind, flags in {
    'str': '''
        data data_dir dataset train_split val_split class_map input_img_mode input_key target_key model
        pretrained_path initial_checkpoint resume gp interpolation fuser torchcompile_mode torchcompile device
        amp_dtype model_dtype opt clip_mode sched lr_base_scale train_crop_mode aa remode mixup_mode
        train_interpolation dist_bn worker_seeding output experiment eval_metric wandb_project wandb_resume_id
        naflex_loss_scale kd_model_name kd_distill_type kd_loss_type kd_token_distill_type''',
    'int': '''
        train_num_samples val_num_samples num_classes img_size in_chans batch_size validation_batch_size
        grad_accum_steps local_rank lr_base_size lr_cycle_limit epochs start_epoch warmup_epochs cooldown_epochs
        patience_epochs aug_splits recount mixup_off_epoch seed log_interval val_interval recovery_interval
        checkpoint_hist workers tta naflex_max_seq_len kd_student_feature_dim kd_teacher_feature_dim''',
    'bool': '''
        dataset_download dataset_trust_remote_code pretrained no_resume_opt channels_last grad_checkpointing
        fast_norm torchscript amp no_ddp_bb synchronize_step sched_on_updates warmup_prefix no_aug jsd_loss
        bce_loss bce_sum resplit sync_bn split_bn model_ema model_ema_force_cpu model_ema_warmup save_images
        pin_mem no_prefetcher use_multi_epochs_loader log_wandb naflex_loader naflex_patchify_channels_first''',
    'list of int': '''
        input_size decay_milestones naflex_train_seq_lens naflex_patch_sizes''',
    'float': '''
        crop_pct head_init_scale head_init_bias opt_eps momentum weight_decay clip_grad layer_decay
        layer_decay_min_scale layer_decay_no_opt_scale lr lr_base lr_noise_pct lr_noise_std lr_cycle_mul
        lr_cycle_decay lr_k_decay warmup_lr min_lr epoch_repeats decay_epochs decay_rate hflip vflip
        color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob aug_repeats bce_target_thresh
        bce_pos_weight reprob mixup cutmix mixup_prob mixup_switch_prob smoothing drop drop_connect drop_path
        drop_block bn_momentum bn_eps model_ema_decay distill_loss_weight task_loss_weight kd_temperature''',
    'list of float': '''
        mean std opt_betas lr_noise scale ratio cutmix_minmax naflex_patch_size_probs''',
    'dict': '''
        model_kwargs opt_kwargs''',
    'list of str': '''
        device_modules wandb_tags''',
}.items() for flag in flags.split()}
NULLABLE = {'color_jitter'}  # null turns it off


def test_the_files_are_those_that_generate_py_writes():
    expected = runpy.run_path(str(ROOT / 'generate.py'))['files']()
    assert {path for path in expected if path.suffix == '.yaml'} == set(ROOT.glob('*/*.yaml'))
    stale = [str(path) for path, text in expected.items() if path.read_text(encoding='utf-8') != text]
    assert not stale, f'run python recipes/generate.py: {stale}'


def test_the_index_names_every_recipe():
    index = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert set(re.findall(r'\]\(([^)]*)\.yaml\)', index)) == RECIPES.keys()


def kind_of(value: Any) -> str:
    if isinstance(value, list):
        return f'list of {" or ".join({kind_of(item) for item in value})}'
    return type(value).__name__


def test_every_key_is_a_flag_of_train_py_and_has_its_type():
    wrong = [
        f'{name}: {key}: {value!r} ({kind_of(value)}, the flag: {FLAGS.get(key, "unknown")})'
        for name, recipe in RECIPES.items() for key, value in recipe.items()
        if FLAGS.get(key) != kind_of(value) and not (value is None and key in NULLABLE)]
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
    used = {key for recipe in RECIPES.values() for key in recipe}
    assert {key: real.get(key) for key in used} == {key: FLAGS.get(key) for key in used}


def test_no_key_stands_twice_in_a_file():
    assert {name: len(re.findall(r'^\w+:', text, re.M)) for name, text in TEXTS.items()} == {
        name: len(recipe) for name, recipe in RECIPES.items()}


def test_every_recipe_loads_the_plugin_and_its_header_names_it():
    for name, text in TEXTS.items():
        assert RECIPES[name]['device_modules'] == ['timm_awm'], name
        assert f'timm-awm train -c {name}\n' in text and f'python path/to/train.py -c recipes/{name}.yaml\n' in text
        for file in re.findall(r'[\w/]+\.yaml', text.replace(f'recipes/{name}.yaml', '')):
            assert (ROOT / name).with_name(file).is_file(), f'{name} names {file}'
        assert max(map(len, text.splitlines())) <= 120, name


def control_of(name: str) -> str:
    return re.sub(r'_(t\d+|merges)$', '', name) + '_plain'


@pytest.mark.parametrize('name', AWM)
def test_a_control_differs_in_nothing_but_merges_and_alternation(name):
    def rest(recipe):
        options = {k: v for k, v in recipe.get('opt_kwargs', {}).items() if k not in turns}
        return {**{k: v for k, v in recipe.items() if k not in ('model_kwargs', 'opt', *rate)}, 'opt_kwargs': options}

    turns = ('base', 'period', 'merge_period')
    rate: Tuple[str, ...] = ()
    if re.search(r'_t[1-9]\d*$', name):
        rate = ('decay_milestones',)  # the rate follows the count of backbone epochs: the passes depend on t
    elif name.endswith('_merges'):
        turns, rate = ('base', 'train'), ('lr',)  # all that is trained starts anew
        assert 'a tenth of the learning rate' in ' '.join(TEXTS[name].replace('\n#', ' ').split())
        assert RECIPES[name]['lr'] == pytest.approx(10 * RECIPES[control_of(name)]['lr'])
    awm, control = RECIPES[name], RECIPES[control_of(name)]
    assert rest(awm) == rest(control)
    assert awm['opt_kwargs']['base'] == control['opt']
    assert 'model_kwargs' not in awm and control['model_kwargs'] == {'awm': False}
    assert f'{control_of(name).rpartition("/")[2]}.yaml' in TEXTS[name]


def test_every_plain_recipe_is_a_control_or_says_that_it_is_none():
    controls = {control_of(name) for name in AWM}
    plain = RECIPES.keys() - set(AWM)
    assert controls <= plain
    assert {name for name in plain if TEXTS[name].startswith('# NOT A CONTROL')} == plain - controls
    assert all(re.search(r'_plain\d+$', name) for name in plain - controls)
    assert all(RECIPES[name]['model_kwargs'] == {'awm': False} for name in plain)


@functools.lru_cache(maxsize=None)
def meta_model(name: str, model_kwargs: str) -> torch.nn.Module:
    with torch.device('meta'):
        return timm.create_model(name, **json.loads(model_kwargs))


def test_models_and_optimizers_are_accepted_by_timm():
    tried = set()
    for name, recipe in RECIPES.items():
        model_kwargs, opt_kwargs = recipe.get('model_kwargs', {}), recipe.get('opt_kwargs', {})
        args = argparse.Namespace(**{
            key: recipe.get(key, default)
            for key, default in dict(opt='sgd', lr=0.1, weight_decay=2e-5, momentum=0.9).items()})
        key = json.dumps([recipe['model'], model_kwargs, vars(args), opt_kwargs], sort_keys=True)
        if key in tried:
            continue
        tried.add(key)
        try:
            model = meta_model(recipe['model'], json.dumps(model_kwargs))
            optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **opt_kwargs)
        except Exception as error:
            raise AssertionError(f'{name}: {error!r}') from error
        decayed = {group['weight_decay'] for group in optimizer.param_groups}
        if not opt_kwargs.get('filter_bias_and_bn', True):
            assert decayed == {recipe['weight_decay']}, name


class Authors(NamedTuple):
    """The authors' schedule, or that in proportion: the rate is cut when these epochs of the backbone begin; t None:
    every pass is one."""
    passes: int
    cuts: Tuple[int, ...]
    t: Optional[int] = None


def authors_schedule(name: str) -> Authors:
    t = re.search(r'_t([1-9]\d*)$', name)  # joint training has the rates of t = 3
    period = int(t.group(1)) if t else 3
    plain = re.search(r'_plain(\d+)$', name)
    passes = int(plain.group(1)) if plain else None
    if name.startswith('cifar10_short/'):
        if passes in (11, 14):
            baseline = Authors(165, (80, 120))
            return Authors(passes, tuple(round(cut * passes / baseline.passes) for cut in baseline.cuts))
        whole = Authors(900, (225, 337)) if 'densenet' in name else Authors(700, (150, 250))
        cuts = tuple(round(cut * 60 / whole.passes) for cut in whole.cuts)
        return Authors(30, cuts) if passes == 30 else Authors(60, cuts, period)
    if passes:
        return Authors(passes, {165: (80, 120), 100: (30, 60, 90)}[passes])
    if name.startswith('imagenet/'):
        return Authors(200, (30, 60, 90), 1)
    if 'densenet' in name:
        return Authors(900, (225, 337), 3)
    return Authors(700, (150, 250), period)


def begun(passes: int, t: Optional[int]) -> List[int]:
    """The backbone epoch that has last begun, for every pass."""
    result, count = [], 0
    for i in range(passes):
        count += t is None or PhaseSchedule(t).phase(i) == 'backbone'
        result.append(count - 1)
    return result


@pytest.mark.parametrize('name', [name for name, recipe in RECIPES.items() if recipe['sched'] == 'multistep'])
def test_the_rate_falls_where_the_authors_backbone_epochs_begin(name):
    recipe = RECIPES[name]
    authors = authors_schedule(name)
    assert recipe['epochs'] == authors.passes
    if name in AWM:
        assert recipe['opt_kwargs']['period'] == (0 if name.endswith('_t0') else authors.t)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=recipe['lr'])
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(argparse.Namespace(**recipe)))
    rates = []
    for epoch in range(epochs):  # as train.py does
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    expected = [0.1 * 0.1 ** sum(b >= cut for cut in authors.cuts) for b in begun(authors.passes, authors.t)]
    assert rates == pytest.approx(expected)
