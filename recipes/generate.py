"""Writes the recipes and the table in README.md: python recipes/generate.py

train.py reads one YAML file and knows no includes, so every recipe is whole. They are text, for the comments matter.
"""
import re
import textwrap
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Tuple

ROOT = Path(__file__).parent

# Table 2: test error in %, plain and AWM on CIFAR-10, plain and AWM on CIFAR-100
CIFAR_RESNETS = {
    14: ('9.21', '8.13', '34.01', '31.77'),
    20: ('8.42', '6.73', '32.62', '30.57'),
    32: ('7.46', '6.09', '31.47', '28.88'),
    44: ('7.16', '5.75', '29.62', '27.70'),
    56: ('6.96', '5.54', '28.90', '27.09'),
    110: ('6.61', '5.23', '27.81', '25.54'),
}
CIFAR_DENSENETS = (22, 28, 34, 40)
# Table 4: top-1 and top-5 error in %, plain and AWM
IMAGENET_RESNETS = {
    18: (('30.08', '10.78'), ('29.36', '10.41')),
    50: (('24.52', '7.50'), ('24.04', '7.31')),
}

MODULES = 'device_modules: [timm_awm]  # imports the plugin; must be a list'
SGD = ('sgd  # with Nesterov momentum', 'filter_bias_and_bn: false  # weight decay on all parameters')

CIFAR10 = 'dataset: hfds/uoft-cs/cifar10\ntarget_key: label\nnum_classes: 10'
CIFAR100 = 'dataset: hfds/uoft-cs/cifar100\ntarget_key: fine_label\nnum_classes: 100'
CIFAR = f"""\
# shared by all CIFAR recipes
{MODULES}
input_key: img
train_split: train
val_split: test

momentum: 0.9
weight_decay: 1.0e-4
lr: 0.1
sched: multistep
decay_rate: 0.1
warmup_epochs: 0

train_crop_mode: pad4  # zero-pad 4, crop at random: timm_awm's, timm has none like it
hflip: 0.5
color_jitter: null
smoothing: 0.0

channels_last: true
"""

CIFAR_SHORT = CIFAR.replace(
    'train_split: train\nval_split: test',
    'train_split: train[:45000]\nval_split: train[45000:]  # choices are made on these; needs timm 1.0.31',
) + """\
amp: true
amp_dtype: bfloat16
"""

IMAGENET_DATA = f"""\
{MODULES}
dataset: hfds/ILSVRC/imagenet-1k
input_key: image
target_key: label
train_split: train
val_split: validation
num_classes: 1000
channels_last: true
"""
IMAGENET = f"""\
# shared by the paper's ImageNet recipes
{IMAGENET_DATA}
batch_size: 256  # of each process
momentum: 0.9
weight_decay: 1.0e-4
lr: 0.1
sched: multistep
decay_rate: 0.1
warmup_epochs: 0

hflip: 0.5  # after timm's random resized crop
color_jitter: null
smoothing: 0.0
train_interpolation: bilinear
interpolation: bilinear
crop_pct: 0.875
"""
IMAGENET_LAMB = f"""\
# shared by both LAMB recipes
{IMAGENET_DATA}
batch_size: 256  # of each process; with n processes --grad-accum-steps 8/n
grad_accum_steps: 8
lr: 5.0e-3
weight_decay: 0.02
sched: cosine
min_lr: 1.0e-6
warmup_epochs: 5
warmup_lr: 1.0e-4

hflip: 0.5
aa: rand-m7-mstd0.5-inc1
mixup: 0.1
cutmix: 1.0
smoothing: 0.0
bce_loss: true
interpolation: bicubic
crop_pct: 0.95

amp: true
amp_dtype: bfloat16
model_ema: true
model_ema_decay: 0.9998
"""

FINETUNE_MODEL = 'awm_resnet50.a1_in1k_identity'  # the plain checkpoint at the identity start
FINETUNE_PASSES = 40
FINETUNE = f"""\
# shared by the fine-tuning recipes
pretrained: true
{MODULES}
dataset: hfds/timm/oxford-iiit-pet
input_key: image
target_key: label
train_split: train
val_split: test
num_classes: 37

batch_size: 64
weight_decay: 0.05
sched: cosine
min_lr: 1.0e-6
warmup_epochs: 4
warmup_lr: 1.0e-6

hflip: 0.5
color_jitter: null
smoothing: 0.1
interpolation: bicubic
crop_pct: 0.95

channels_last: true
"""

FROM_HUB = "Data: from the Hugging Face Hub on first use (needs the extra 'data'), or from disk: --data-dir PATH"
IMAGENET_FROM = (
    "Data: from the Hugging Face Hub (needs the extra 'data'; accept the terms there, then hf auth login), or from "
    "disk: --data-dir PATH, with folders 'train' and 'validation' of class folders or the Hub's Parquet files")
WEIGHTS_FROM = (
    "Weights: timm's own of the plain network, from the Hugging Face Hub on first use, or any other plain checkpoint "
    'of a ResNet-50: --pretrained-path FILE')
OVERRIDE = 'Override by flags after it, for example'
SHORT = '  a short run: --epochs 24 --decay-milestones 11 18'
SHORT_FINETUNE = '  a short run: --epochs 12'
ON_CPU = '  on a CPU: --device cpu --no-prefetcher'
OTHER_PERIOD = '  another t: --opt-kwargs base=sgd period=5 filter_bias_and_bn=False'
FOUR_GPUS = '  4 GPUs: torchrun --nproc_per_node=4 -m timm_awm train -c {} {}'
EQUAL = 'with as many passes over the data and the same learning rates'
NOT_RUN = 'Paper: does not report it. The recipe is ours and has not been run.'


class Schedule(NamedTuple):
    """The authors': t, passes in all, cuts of the rate at backbone epochs; passes and cuts of their plain baseline."""
    t: int
    passes: int
    cuts: Tuple[int, ...]
    unequal_passes: int
    unequal_cuts: Tuple[int, ...]


CIFAR_RESNET = Schedule(3, 700, (150, 250), 165, (80, 120))
CIFAR_DENSENET = Schedule(3, 900, (225, 337), 165, (80, 120))
# the same in proportion
CIFAR_RESNET_SHORT = Schedule(3, 60, (13, 21), 14, (7, 10))
CIFAR_DENSENET_SHORT = Schedule(3, 60, (15, 22), 11, (5, 8))
IMAGENET_RESNET = Schedule(1, 200, (30, 60, 90), 100, (30, 60, 90))


class Recipe(NamedTuple):
    """One file: a header of what it is and how to use it, the keys that set it apart, those that it shares."""
    name: str
    about: Tuple[str, ...]
    use: Tuple[str, ...]
    keys: Tuple[str, ...]
    shared: str

    def text(self) -> str:
        start = [
            f'# Start: timm-awm train -c {self.name}',
            f'#   or: python path/to/train.py -c recipes/{self.name}.yaml',
        ]
        header = [*map(comment, self.about), '#', *start, *map(comment, self.use)]
        return '\n'.join([*header, '', *self.keys, '', self.shared])


class Row(NamedTuple):
    """One line of the table in README.md."""
    recipe: str
    model: str
    data: str
    paper: str
    errors: str
    control: str
    unequal: Tuple[str, ...] = ()


Entry = Tuple[List[Recipe], Row]


def comment(text: str) -> str:
    return textwrap.fill(
        text, 120, initial_indent='# ', subsequent_indent='#   ', break_on_hyphens=False, break_long_words=False)


def first_pass(backbone_epoch: int, t: int) -> int:
    """The pass over the data with which a backbone epoch begins, both counted from 0."""
    return backbone_epoch // t * 2 * t + backbone_epoch % t


def milestones(passes: Iterable[int], what: str) -> str:
    return f'decay_milestones: {[p + 1 for p in passes]}  # {what}; timm cuts one pass before a milestone'


def cuts_at(epochs: Tuple[int, ...], t: int) -> str:
    *most, last = map(str, epochs)
    return milestones((first_pass(epoch, t) for epoch in epochs), f'backbone epochs {", ".join(most)} and {last}')


def backbone_epochs(passes: int, t: int) -> int:
    return sum(i % (2 * t) < t for i in range(passes))


def epochs_in_turn(passes: int, t: int) -> str:
    backbone = backbone_epochs(passes, t)
    return f'epochs: {passes}  # {backbone} of the backbone and {passes - backbone} of the merges, in turn'


def every(t: int) -> str:
    return f'every t = {t} epoch' + 's' * (t > 1)


def alternating(model: str, base: str, t: int, *options: str) -> Tuple[str, ...]:
    return (
        f'model: {model}', 'opt: alternating', 'opt_kwargs:', f'  base: {base}', f'  period: {t}  # t',
        *(f'  {option}' for option in options))


def plain(model: str, opt: str, *options: str) -> Tuple[str, ...]:
    return (
        f'model: {model}', 'model_kwargs:', "  awm: false  # timm's plain blocks, no merges", f'opt: {opt}',
        *['opt_kwargs:'][:len(options)], *(f'  {option}' for option in options))


def trio(
        name: str,
        title: str,
        data: str,
        paper: Tuple[str, str, str],
        schedule: Schedule,
        own: Tuple[str, ...],
        shared: str,
        use: Tuple[str, ...],
        use_alternating: Tuple[str, ...] = (),
) -> List[Recipe]:
    """An AWM recipe of the paper, its control, and the authors' unequal baseline."""
    t, passes, cuts, unequal_passes, unequal_cuts = schedule
    model = name.rpartition('/')[2]
    return [
        Recipe(
            name,
            (
                f'{title} with active weighted mapping (AWM) on {data}, backbone and merges in turn, {every(t)}.',
                paper[0],
                f'Control: {model}_plain.yaml, the plain network {EQUAL}.',
            ),
            (*use, *use_alternating),
            (*alternating(model, SGD[0], t, SGD[1]), epochs_in_turn(passes, t), cuts_at(cuts, t), *own),
            shared,
        ),
        Recipe(
            f'{name}_plain',
            (f'The plain {title} on {data}: the control of {model}.yaml, {EQUAL}.', paper[1]),
            use,
            (*plain(model, *SGD), f'epochs: {passes}', cuts_at(cuts, t), *own),
            shared,
        ),
        Recipe(
            f'{name}_plain{unequal_passes}',
            (
                f"NOT A CONTROL: the authors' own baseline, the plain {title} on {data} with {unequal_passes} passes "
                f'over the data, where AWM makes {passes}. The control of {model}.yaml is {model}_plain.yaml.',
                paper[2],
            ),
            use,
            (
                *plain(model, *SGD), f'epochs: {unequal_passes}',
                milestones(unequal_cuts, f'passes {", ".join(map(str, unequal_cuts))}'), *own,
            ),
            shared,
        ),
    ]


def cifar(folder: str, family: str, layers: int) -> Entry:
    data, own = {'cifar10': ('CIFAR-10', CIFAR10), 'cifar100': ('CIFAR-100', CIFAR100)}[folder]
    model = f'awm_{family}{layers}_cifar'
    name = f'{folder}/{model}'
    table, errors = '', 'not reported'
    paper = ('Paper: does not report it; the settings are those of CIFAR-10.',) * 3
    if family == 'resnet':
        error, awm = CIFAR_RESNETS[layers][:2] if folder == 'cifar10' else CIFAR_RESNETS[layers][2:]
        table, errors = 'Table 2', f'{error} → {awm}'
        paper = (
            f"Paper (Table 2): {awm} % test error, and {error} % of a plain network with, in the authors' code, 165 "
            'passes.',
            f'Paper: nothing for as many passes; {error} % test error (Table 2) is that of {model}_plain165.yaml.',
            f'Paper (Table 2): {error} % test error.')
    elif folder == 'cifar10':
        table, errors = 'Fig. 9', '0.62 points better on average'
        drawn = 'Paper (Fig. 9, drawn): AWM is 0.62 points better on the average of 22 to 40 layers.'
        paper = (drawn, f'Paper: nothing for as many passes; Fig. 9 has {model}_plain165.yaml.', drawn)
    recipes = trio(
        name,
        f'{"ResNet" if family == "resnet" else "DenseNet"}-{layers}',
        data,
        paper,
        CIFAR_RESNET if family == 'resnet' else CIFAR_DENSENET,
        (f'batch_size: {128 if family == "resnet" else 64}', own),
        CIFAR,
        (FROM_HUB, OVERRIDE, SHORT, ON_CPU),
        (OTHER_PERIOD,),
    )
    return recipes, Row(name, f'`{model}`, t = 3', data, table, errors, f'{name}_plain', (f'{name}_plain165',))


def other_period(t: int) -> Entry:
    """One of the other values of t: ResNet-20 on CIFAR-10."""
    name = f'cifar10/awm_resnet20_cifar_t{t}'
    recipe = with_period(
        name, t, 'Paper (Figs. 4 and 5, drawn): in numbers only that t = 3 is best, 1.09 points better than t = 0.',
        CIFAR_RESNET, CIFAR)
    errors = 'drawn; t = 3 is best' if t else '1.09 points worse than t = 3'
    return [recipe], period_row(name, t, 'Figs. 4, 5', errors)


def with_period(name: str, t: int, paper: str, schedule: Schedule, shared: str) -> Recipe:
    """A ResNet on CIFAR-10 with another t than 3."""
    model = name.rpartition('/')[2].rpartition('_')[0]
    passes, cuts = schedule.passes, schedule.cuts
    if t:
        how = f'in turn, {every(t)}.'
        control = f'Control: {model}_plain.yaml, as for t = {schedule.t}.'
        here, there = ([first_pass(cut, period) for cut in cuts] for period in (t, schedule.t))
        if here != there:
            control += (
                f' The rate is cut at passes {here[0]} and {here[1]} here, where backbone epochs {cuts[0]} and '
                f'{cuts[1]} begin, and at {there[0]} and {there[1]} there.')
        length = (epochs_in_turn(passes, t), cuts_at(cuts, t))
    else:
        how = f'trained jointly (t = 0), in {passes} joint passes: as many passes as with any other t.'
        control = f'Control: {model}_plain.yaml, the plain network {EQUAL}.'
        cut_passes = [first_pass(cut, schedule.t) for cut in cuts]
        length = (f'epochs: {passes}', milestones(cut_passes, f'as with t = {schedule.t}'))
    layers = model.removeprefix('awm_resnet').removesuffix('_cifar')
    return Recipe(
        name,
        (
            f'ResNet-{layers} with active weighted mapping (AWM) on CIFAR-10, backbone and merges {how}',
            paper,
            control,
        ),
        (FROM_HUB, OVERRIDE, SHORT, ON_CPU),
        (*alternating(model, SGD[0], t, SGD[1]), *length, 'batch_size: 128', CIFAR10),
        shared,
    )


def period_row(name: str, t: int, paper: str, errors: str) -> Row:
    model = name.rpartition('_')[0]
    return Row(
        name, f'`{model.rpartition("/")[2]}`, t = {t}' + ', joint' * (t == 0), 'CIFAR-10', paper, errors,
        f'{model}_plain')


def short(family: str, layers: int, periods: Tuple[int, ...] = ()) -> List[Entry]:
    """Our own experiments: the paper's schedule in small, its control, two shorter plain runs, other values of t."""
    title = f'{"ResNet" if family == "resnet" else "DenseNet"}-{layers}'
    whole, schedule = {
        'resnet': (CIFAR_RESNET, CIFAR_RESNET_SHORT), 'densenet': (CIFAR_DENSENET, CIFAR_DENSENET_SHORT)}[family]
    t, passes, cuts, *_ = schedule
    model = f'awm_{family}{layers}_cifar'
    name = f'cifar10_short/{model}'
    own = (f'batch_size: {128 if family == "resnet" else 64}', CIFAR10)
    use = (FROM_HUB, OVERRIDE, ON_CPU)
    paper = f'Paper: {whole.passes} passes, and {whole.unequal_passes} of the plain network; here in proportion.'
    recipes = trio(name, title, 'CIFAR-10', (paper,) * 3, schedule, own, CIFAR_SHORT, use)
    half = backbone_epochs(passes, t)
    recipes.append(Recipe(
        f'{name}_plain{half}',
        (
            f'NOT A CONTROL: the plain {title} on CIFAR-10 with {half} passes over the data, as many as the '
            f'backbone of {model}.yaml is trained in, without those of the merges.',
            paper,
        ),
        use,
        (
            *plain(model, *SGD), f'epochs: {half}',
            milestones(cuts, f'passes {", ".join(map(str, cuts))}'), *own,
        ),
        CIFAR_SHORT,
    ))
    unequal = tuple(recipe.name for recipe in recipes[2:])
    errors = f'not with {passes} passes'
    row = Row(name, f'`{model}`, t = {t}', 'CIFAR-10', '', errors, f'{name}_plain', unequal)
    others: List[Entry] = [
        ([with_period(f'{name}_t{other}', other, paper, schedule, CIFAR_SHORT)],
         period_row(f'{name}_t{other}', other, '', errors))
        for other in periods]
    return [(recipes, row), *others]


def imagenet(layers: int) -> Entry:
    model = f'awm_resnet{layers}'
    name = f'imagenet/{model}'
    (top1, top5), (awm_top1, awm_top5) = IMAGENET_RESNETS[layers]
    error = f'{top1} % top-1 and {top5} % top-5 error'
    paper = (
        f'Paper (Table 4): {awm_top1} % top-1 and {awm_top5} % top-5 error, plain {top1} % and {top5} %. It says "100 '
        'epochs": read here as 100 of each side, for its CIFAR runs count those of the backbone.',
        f'Paper: nothing for as many passes; {error} (Table 4) is that of {model}_plain100.yaml.',
        f'Paper (Table 4): {error}.')
    recipes = trio(
        name, f'ResNet-{layers}', 'ImageNet-1k', paper, IMAGENET_RESNET, (), IMAGENET,
        (IMAGENET_FROM, OVERRIDE, '  in bfloat16: --amp --amp-dtype bfloat16', FOUR_GPUS.format('...', '-b 64')))
    errors = f'top-1 {top1} → {awm_top1}, top-5 {top5} → {awm_top5}'
    return recipes, Row(
        name, f'`{model}`, t = 1', 'ImageNet-1k', 'Table 4', errors, f'{name}_plain', (f'{name}_plain100',))


def ours(
        name: str,
        model: str,
        what: str,
        data: str,
        base: str,
        passes: int,
        own: Tuple[str, ...],
        shared: str,
        use: Tuple[str, ...],
) -> Entry:
    """A recipe that is not of the paper, with its control; joint, for alternation was worse at equal passes."""
    file = name.rpartition('/')[2]
    recipes = [
        Recipe(
            name,
            (
                f'ResNet-50 with active weighted mapping (AWM) on {data}, {what}; backbone and merges are trained '
                'jointly, for alternation was worse on CIFAR-10 at equal passes.',
                NOT_RUN,
                f'Control: {file}_plain.yaml, the plain network {EQUAL}.',
            ),
            use,
            (*alternating(model, base, 0), f'epochs: {passes}', *own),
            shared,
        ),
        Recipe(
            f'{name}_plain',
            (f'The plain ResNet-50 on {data}, {what}: the control of {file}.yaml, {EQUAL}.', NOT_RUN),
            use,
            (*plain(model, base), f'epochs: {passes}', *own),
            shared,
        ),
    ]
    return recipes, Row(name, f'`{model}`, t = 0, joint', data, '', 'not of the paper, not run', f'{name}_plain')


def merges_alone() -> Entry:
    """Fine-tuning of the merges and a new classifier; its control is that of the other fine-tuning recipe."""
    name, data, control = 'finetune/awm_resnet50_merges', 'Oxford-IIIT Pet', 'finetune/awm_resnet50_plain'
    recipe = Recipe(
        name,
        (
            f'ResNet-50 with active weighted mapping (AWM) on {data}: the merges and a new classifier alone are '
            'trained; the backbone stays that of the plain checkpoint, but for the statistics of its BatchNorm.',
            NOT_RUN,
            'Control: awm_resnet50_plain.yaml, all of the plain network trained, with as many passes over the data and '
            'a tenth of the learning rate, for here all that is trained starts anew.',
        ),
        (WEIGHTS_FROM, FROM_HUB, OVERRIDE, SHORT_FINETUNE, ON_CPU),
        (
            f'model: {FINETUNE_MODEL}', 'opt: alternating', 'opt_kwargs:', '  base: adamw', '  train: merge+head',
            f'epochs: {FINETUNE_PASSES}', 'lr: 1.0e-3'),
        FINETUNE,
    )
    return [recipe], Row(
        name, f'`{FINETUNE_MODEL}`, merges and classifier alone', data, '', 'not of the paper, not run', control)


def entries() -> List[Entry]:
    return [
        *(cifar('cifar10', 'resnet', layers) for layers in CIFAR_RESNETS),
        *(other_period(t) for t in (0, 1, 5, 10)),
        *(cifar('cifar10', 'densenet', layers) for layers in CIFAR_DENSENETS),
        *short('resnet', 14, (0, 1, 5, 10)),
        *short('resnet', 20, (0,)),
        *short('densenet', 22),
        *(cifar('cifar100', 'resnet', layers) for layers in CIFAR_RESNETS),
        *(cifar('cifar100', 'densenet', layers) for layers in CIFAR_DENSENETS),
        *(imagenet(layers) for layers in IMAGENET_RESNETS),
        ours(
            'imagenet/awm_resnet50_lamb',
            'awm_resnet50',
            'in the manner of A2 of "ResNet strikes back" (arXiv 2110.00476)',
            'ImageNet-1k', 'lamb', 300, (), IMAGENET_LAMB,
            (IMAGENET_FROM, OVERRIDE, FOUR_GPUS.format('...', '--grad-accum-steps 2'))),
        ours(
            'finetune/awm_resnet50',
            FINETUNE_MODEL,
            'fine-tuned from weights of the plain network',
            'Oxford-IIIT Pet', 'adamw', FINETUNE_PASSES, ('lr: 1.0e-4',), FINETUNE,
            (WEIGHTS_FROM, FROM_HUB, OVERRIDE, SHORT_FINETUNE, ON_CPU)),
        merges_alone(),
    ]


def link(name: str) -> str:
    return f'[{name.rpartition("/")[2]}]({name}.yaml)'


def files() -> Dict[Path, str]:
    """What this script writes: the text of each file."""
    table = entries()
    result = {ROOT / f'{recipe.name}.yaml': recipe.text() for recipes, _ in table for recipe in recipes}
    lines = [
        '| recipe | model | data | paper | its error in %, plain → AWM | control | unequal baselines |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for _, row in table:
        cells = (
            f'[{row.recipe}]({row.recipe}.yaml)', row.model, row.data, row.paper or '—', row.errors, link(row.control),
            ', '.join(map(link, row.unequal)) or '—')
        lines.append(f'| {" | ".join(cells)} |')
    readme = ROOT / 'README.md'
    before, after = re.split(r'(?:^\|.*\n)+', readme.read_text(encoding='utf-8'), flags=re.M)
    return {**result, readme: before + '\n'.join(lines) + '\n' + after}


def main() -> None:
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
