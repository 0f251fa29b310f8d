"""`timm-awm recipes`: list, show or copy recipes for training."""
from argparse import ArgumentParser, Namespace

HELP = 'list, show or copy recipes for training'


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = 'Lists the recipes, shows one, or copies one to be changed.'
    parser.epilog = (
        "Example: timm-awm recipes 'imagenet/*'; timm-awm recipes --show cifar10/awm_resnet20_cifar; "
        'timm-awm recipes --copy cifar10/awm_resnet20_cifar mine.yaml')
    parser.add_argument('pattern', nargs='?', default='*', help='wildcard for names (%(default)s)')
    action = parser.add_mutually_exclusive_group()
    action.add_argument('--show', metavar='RECIPE', help='print a recipe')
    action.add_argument('--copy', metavar=('RECIPE', 'FILE'), nargs=2, help='copy a recipe to a new file')


def run(args: Namespace) -> None:
    import fnmatch

    from timm_awm import scripts
    if args.show is not None:
        print(scripts.find_recipe(args.show).read_text(encoding='utf-8'), end='')
    elif args.copy:
        name, goal = args.copy
        recipe = scripts.find_recipe(name).read_bytes()
        with open(goal, 'xb') as file:
            file.write(recipe)
        print(f'{goal}: start it with timm-awm train -c {goal}')
    else:
        names = fnmatch.filter(scripts.recipes(), args.pattern)
        if not names:
            raise ValueError(f'No recipe is called {args.pattern!r}; without a pattern all are listed.')
        print('\n'.join(names))
