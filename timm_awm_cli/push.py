import argparse
from pathlib import Path

HELP = 'publish a folder on the Hugging Face Hub'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Publishes a folder that timm-awm export or timm_awm.hub.save_for_hub wrote, in one commit, and compares '
        'every file with its hash on the Hub. A new repository is private. Log in with hf auth login.')
    parser.epilog = 'Example: timm-awm push awm_resnet20_cifar.t3_c10 me/awm_resnet20_cifar.t3_c10'
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    parser.add_argument('repo_id', metavar='REPO_ID', help='OWNER/NAME, or NAME of yours')
    parser.add_argument('--public', action='store_true', help='visibility of a new repository')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to, made if need be (main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument(
        '--space', action='store_true', help='and the page of timm-awm explore for it, as a Space of the same name')


def run(args: argparse.Namespace) -> None:
    from timm_awm import hub
    if args.space and (args.revision or args.create_pr):
        raise ValueError('A Space shows the main branch: --space goes without --revision and --create-pr.')
    url = hub.push(
        args.folder, args.repo_id, private=not args.public, revision=args.revision, create_pr=args.create_pr)
    print(f'{args.folder}: published and compared: {url}')
    if args.space:
        print(f'Its Space: {hub.push_space(args.repo_id, private=not args.public)}')
