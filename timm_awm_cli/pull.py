import argparse
from pathlib import Path

HELP = 'fetch a model from the Hugging Face Hub and check it'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Fetches an AWM model from the Hub, compares every file with its hash there, loads the model and says what it '
        'is. With HF_HUB_OFFLINE=1 it is taken from the cache.')
    parser.epilog = 'Example: timm-awm pull me/awm_resnet20_cifar.t3_c10 --output awm_resnet20_cifar.t3_c10'
    parser.add_argument('repo_id', metavar='REPO_ID', help='OWNER/NAME')
    parser.add_argument('--output', type=Path, metavar='FOLDER', help="new folder (the Hub's cache)")
    parser.add_argument('--revision', help='branch, tag, commit or pull request (main)')


def run(args: argparse.Namespace) -> None:
    from timm_awm import hub
    pulled = hub.pull(args.repo_id, args.output, args.revision)
    print(hub.describe(pulled.folder, pulled.model))
    compared = 'compared' if pulled.verified else 'not compared, for the Hub is not asked (HF_HUB_OFFLINE)'
    print(f'Commit {pulled.commit}, {compared} with its hashes on the Hub. Folder: {pulled.folder}')
