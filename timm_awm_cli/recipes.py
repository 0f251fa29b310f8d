"""`timm-awm recipes`: list recipes for training."""
import fnmatch
from argparse import ArgumentParser, Namespace
from typing import Dict, List

import yaml

from . import scripts

HELP = 'list recipes for training'


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = 'Lists the recipes, where they lie, and the flags that make the plain control of each.'
    parser.epilog = "Example: timm-awm recipes 'imagenet/*'"
    parser.add_argument('pattern', nargs='?', default='*', help='wildcard for names (default: all)')


def run(args: Namespace) -> None:
    recipes = scripts.recipes()
    names = fnmatch.filter(recipes, args.pattern)
    if not names:
        raise ValueError(f'No recipe is called {args.pattern!r}; without a pattern all are listed.')
    controls: Dict[str, List[str]] = {}
    for name in names:
        text = recipes[name].read_text(encoding='utf-8')
        controls.setdefault(control_flags(text), []).append(name)
        print(f'{name:<{max(map(len, names))}}  {text.splitlines()[0].removeprefix("# ")}')
    print(f'\nFiles: {recipes[names[0]].parents[1]}/NAME.yaml, to read or to copy\n'
          'Start: timm-awm train -c NAME\nPlain control: the same with these flags')
    for flags, of in controls.items():
        print(f'  {flags}{f"   ({of[0]})" if len(of) == 1 else ""}')


def control_flags(recipe: str) -> str:
    """The flags that make a recipe its control: the plain network, with the optimizer that AWM wraps."""
    kwargs = yaml.safe_load(recipe)['opt_kwargs']
    rest = (f' {key}={value}' for key, value in kwargs.items() if key not in ('base', 'period'))
    return f'--opt {kwargs["base"]} --model-kwargs awm=False --opt-kwargs{"".join(rest)}'
