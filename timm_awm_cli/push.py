import argparse
from pathlib import Path

HELP = 'publish a folder on the Hugging Face Hub'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Publishes a folder that timm-awm export or timm_awm.hub.save_for_hub wrote, in one commit. A new repository '
        'is private. Log in with hf auth login.')
    parser.epilog = 'Example: timm-awm push awm_resnet20_cifar.t3_c10 me/awm_resnet20_cifar.t3_c10'
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='folder to publish')
    parser.add_argument('repo_id', metavar='OWNER/NAME', help='repository, created if need be')
    parser.add_argument('--public', action='store_true', help='make a new repository public (default: private)')
    parser.add_argument(
        '--replace-card', action='store_true',
        help='replace the README.md that the repository has (default: keep it, for it may have been edited)')
    parser.add_argument(
        '--space', action='store_true', help='publish the page of timm-awm explore for it too, as a Space of that name')


def run(args: argparse.Namespace) -> None:
    from timm_awm import hub
    options = dict(private=not args.public, replace_card=args.replace_card)
    print(f'{args.folder}: published: {hub.push(args.folder, args.repo_id, **options)}')
    if args.space:
        print(f'Its Space: {hub.push_space(args.repo_id, **options)}')
