import argparse
from pathlib import Path

HELP = 'publish a folder on the Hugging Face Hub'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Publishes a folder that timm-awm export or timm_awm.hub.save_for_hub wrote, in one commit. A new repository '
        'is private. Log in with hf auth login.')
    parser.epilog = 'Example: timm-awm push awm_resnet20_cifar.t3_c10 me/awm_resnet20_cifar.t3_c10'
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    parser.add_argument('repo_id', metavar='REPO_ID', help='OWNER/NAME, or NAME of yours')
    parser.add_argument('--public', action='store_true', help='make a new repository public (default: private)')
    parser.add_argument(
        '--revision', metavar='BRANCH', help='branch to commit to, made if need be (default: the main branch)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument(
        '--replace-card', action='store_true',
        help='replace the README.md that the repository has (default: keep it, for it may have been edited)')
    parser.add_argument(
        '--space', action='store_true', help='publish the page of timm-awm explore for it too, as a Space of that name')


def run(args: argparse.Namespace) -> None:
    if args.space and (args.revision or args.create_pr):
        raise ValueError('A Space shows the main branch: --space goes without --revision and --create-pr.')
    from timm_awm import hub
    url = hub.push(
        args.folder,
        args.repo_id,
        private=not args.public,
        revision=args.revision,
        create_pr=args.create_pr,
        replace_card=args.replace_card,
    )
    print(f'{args.folder}: published: {url}')
    if args.space:
        space = hub.push_space(args.repo_id, private=not args.public, replace_card=args.replace_card)
        print(f'Its Space: {space}')
