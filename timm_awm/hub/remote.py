"""To the Hugging Face Hub and back, compared."""
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Union

from huggingface_hub import HfApi, constants
from torch import nn

from .. import __version__
from ..models.checkpoint import SAFETENSORS
from ..utils import new_folder
from .card import CARD, OWNER
from .folder import CONFIG, REFERENCE, load_folder

__all__ = ['pull', 'push', 'push_space']

SPACE_CARD = """\
---
title: Inside {name}
sdk: gradio
app_file: app.py
license: apache-2.0
models:
- {repo_id}
---

Which paths does a network with active weighted mapping take for a picture? The page of `timm-awm explore` for
[{repo_id}](https://huggingface.co/{repo_id}).
"""
PUBLISHED = [SAFETENSORS, CONFIG, CARD, REFERENCE, 'args.yaml', 'summary.csv']


def push(
        folder: Union[str, Path],
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        create_pr: bool = False,
) -> str:
    """Publishes a Hub folder in one commit, and compares every file with its hash on the Hub.

    Nothing is uploaded if the folder's model cannot be built and loaded. A repository that does not exist is created;
    one that exists keeps its visibility and its other files. Given again after a failure, it completes.

    Args:
        folder: Hub folder, as `save_for_hub` and `export_run` write it.
        repo_id: Owner/name, or a name alone for the owner of the token.
        private: Visibility of a new repository.
        revision: Branch, created if it does not exist; the main branch if not given.
        create_pr: Open a pull request instead of committing to the branch.

    Returns:
        Address of the commit or the pull request.

    Raises:
        FileNotFoundError: The folder has no card.
        ValueError: The folder does not hold a whole model.
        RuntimeError: The Hub cannot be reached, refuses, or keeps something else.
    """
    folder = Path(folder)
    load_folder(folder)
    card = (folder / CARD).read_text(encoding='utf-8')
    api = HfApi(library_name='timm_awm', library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary, _hub():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        staged = _copy_published(folder, Path(temporary, 'staged'))
        # not those of base models
        card = re.sub(rf'hf-hub:{OWNER}/[\w.-]+', f'hf-hub:{repo_id}', card)
        (staged / CARD).write_text(card, encoding='utf-8')
        names = [path.name for path in staged.iterdir()]
        return _upload(
            api,
            repo_id,
            staged,
            revision=revision,
            create_pr=create_pr,
            commit_message=f'{folder.resolve().name}, by timm-awm push',
            delete_patterns=[name for name in PUBLISHED if name not in names],  # of earlier weights
        )


def push_space(repo_id: str, private: bool = True) -> str:
    """Publishes the page of `timm-awm explore` for a model on the Hub, as a Space of the same name.

    Args:
        repo_id: Of the model, as for `push`.
        private: Visibility of a new Space. One of a private model needs a secret HF_TOKEN that may read it.

    Returns:
        Address of the commit.

    Raises:
        RuntimeError: The Hub cannot be reached, refuses, or keeps something else.
    """
    api = HfApi(library_name='timm_awm', library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary, _hub():
        space = api.create_repo(repo_id, repo_type='space', space_sdk='gradio', private=private, exist_ok=True).repo_id
        files = {
            CARD: SPACE_CARD.format(repo_id=space, name=space.rpartition('/')[2]),
            'requirements.txt': 'timm-awm[explore]\n',
            'app.py': f"from timm_awm.explore import explore\n\nexplore(['hf-hub:{space}'], host='0.0.0.0')\n",
        }
        for name, text in files.items():
            Path(temporary, name).write_text(text, encoding='utf-8')
        return _upload(api, space, Path(temporary), repo_type='space', commit_message='The page of timm-awm explore')


def _upload(api: HfApi, repo_id: str, folder: Path, repo_type: Optional[str] = None, **kwargs: Any) -> str:
    """Commits a folder, and compares every file with its hash on the Hub; returns the address."""
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type=repo_type, **kwargs)
    kept = api.verify_repo_checksums(
        repo_id, repo_type=repo_type, revision=commit.pr_revision or commit.oid, local_dir=folder)
    different = [*kept.extra_paths, *(mismatch['path'] for mismatch in kept.mismatches)]
    if different:
        raise RuntimeError(
            f'{repo_id} was written, but the Hub keeps something else for {", ".join(different)}: push again, and do '
            f'not use what is there now ({commit.commit_url}).')
    return commit.pr_url or commit.commit_url


class Pulled(NamedTuple):
    """What came from the Hub."""
    folder: Path
    model: nn.Module
    commit: str
    verified: bool  # compared with the Hub's hashes; not so without network


def pull(
        repo_id: str,
        output: Union[str, Path, None] = None,
        revision: Optional[str] = None,
) -> Pulled:
    """Fetches an AWM model from the Hub, compares every file with its hash there and loads the model.

    Args:
        repo_id: Owner/name.
        output: New folder; if not given, the model stays in the Hub's cache.
        revision: Branch, tag, commit or pull request (refs/pr/1); the main branch if not given.

    Raises:
        FileExistsError: The output exists.
        RuntimeError: The Hub cannot be reached or refuses, or what came is damaged.
        ValueError: The repository holds no AWM model in safetensors, or the files do not fit together.
    """
    if output is not None and Path(output).exists():
        raise FileExistsError(f'{output} exists already: choose another folder with --output.')
    api = HfApi(library_name='timm_awm', library_version=__version__)
    verified = not constants.HF_HUB_OFFLINE
    with _hub():
        cached = Path(api.snapshot_download(
            repo_id, revision=revision, allow_patterns=PUBLISHED, local_files_only=not verified))
        commit = cached.name
        # without any of our files there is no folder
        kept = api.verify_repo_checksums(repo_id, revision=commit) if verified and cached.is_dir() else None
    damaged = [mismatch['path'] for mismatch in kept.mismatches] if kept else []
    for name in damaged:
        (cached / name).resolve().unlink()
        (cached / name).unlink(missing_ok=True)
    if damaged:
        raise RuntimeError(f'{", ".join(damaged)} came damaged from the Hub, and is out of the cache: try again.')
    if output is None:
        return Pulled(cached, load_folder(cached), commit, verified)
    with new_folder(Path(output)) as partial:
        _copy_published(cached, partial)
        model = load_folder(partial)
    return Pulled(Path(output), model, commit, verified)


def _copy_published(source: Path, goal: Path) -> Path:
    goal.mkdir(exist_ok=True)
    for name in PUBLISHED:
        if (source / name).is_file():
            shutil.copyfile(source / name, goal / name)
    return goal


@contextmanager
def _hub() -> Iterator[None]:
    """Turns what the Hub's client and its connection raise into a RuntimeError."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f'{type(error).__name__}: {error}\nTry again, or log in anew: hf auth login.') from error
