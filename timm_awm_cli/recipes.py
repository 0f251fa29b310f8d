"""`timm-awm recipes`: list recipes for training."""
from argparse import ArgumentParser, Namespace
from typing import Dict, List

import yaml

from . import scripts

HELP = 'list recipes for training'


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = 'Lists the recipes, where they lie, and the flags that make the plain control of each.'
    parser.epilog = 'Example: timm-awm recipes'


def run(args: Namespace) -> None:
    recipes = scripts.recipes()
    controls: Dict[str, List[str]] = {}
    for name, path in recipes.items():
        text = path.read_text(encoding='utf-8')
        controls.setdefault(control_flags(text), []).append(name)
        print(f'{name:<{max(map(len, recipes))}}  {text.splitlines()[0].removeprefix("# ")}')
    print(f'\nFiles: {path.parents[1]}/NAME.yaml, to read or to copy\n'
          'Start: timm-awm train -c NAME\nPlain control: the same with these flags')
    for flags, of in controls.items():
        print(f'  {flags}   ({of[0] if len(of) == 1 else "all others"})')


def control_flags(recipe: str) -> str:
    """The flags that make a recipe its control: the plain network, with the optimizer that AWM wraps."""
    kwargs = yaml.safe_load(recipe)['opt_kwargs']
    rest = (f' {key}={value}' for key, value in kwargs.items() if key not in ('base', 'period'))
    return f'--opt {kwargs["base"]} --model-kwargs awm=False --opt-kwargs{"".join(rest)}'
