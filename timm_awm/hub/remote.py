"""To the Hugging Face Hub and back, through huggingface_hub, and compared."""
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Iterator, List, Optional, Union

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors.torch import load_file, save_file
from torch import nn

from .. import __version__
from ..models.checkpoint import SAFETENSORS
from ..utils import new_folder
from .folder import load_folder

__all__ = ['pull', 'push']

CONFIG = 'config.json'
CARD = 'README.md'
PUBLISHED = (SAFETENSORS, CONFIG, CARD, 'args.yaml', 'summary.csv', 'recipe.yaml')
PICKLE = 'pytorch_model.bin'


def push(
        folder: Union[str, Path],
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        create_pr: bool = False,
        token: Optional[str] = None,
) -> str:
    """Publishes a Hub folder in one commit, fetches it back and compares every tensor and every other file.

    Nothing is uploaded if the folder's model cannot be built and loaded. A repository that does not exist is created;
    one that exists keeps its visibility and what others put there. Given again after a failure, it completes.

    Args:
        folder: Hub folder, as `save_for_hub` and `export_run` write it.
        repo_id: Owner/name, or a name alone for the owner of the token.
        private: Visibility of a new repository.
        revision: Branch, created if it is not there; the main branch if not given.
        create_pr: Open a pull request instead of committing to the branch.
        token: If it is not the one that `hf auth login` has stored.

    Returns:
        Address of the commit or the pull request.

    Raises:
        FileNotFoundError: The folder has no card.
        ValueError: The folder does not hold a whole model.
        RuntimeError: The Hub cannot be reached, refuses, or gave back something else.
    """
    folder = Path(folder)
    load_folder(folder)
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f'{folder} has no {CARD}, which says what the model is.')
    api = HfApi(token=token, library_name='timm_awm', library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary, 'staged')
        staged.mkdir()
        with _hub(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            for name in PUBLISHED:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staged / name)
            card = staged / CARD
            text = card.read_text(encoding='utf-8')
            card.write_text(re.sub(r'hf-hub:[\w.-]+/[\w.-]+', f'hf-hub:{repo_id}', text), encoding='utf-8')
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                revision=revision,
                create_pr=create_pr,
                commit_message=f'{folder.resolve().name}, by timm-awm push',
                delete_patterns=[name for name in PUBLISHED if not (staged / name).is_file()],  # of earlier weights
            )
            fetched = Path(snapshot_download(
                repo_id,
                revision=commit.pr_revision or commit.oid,
                cache_dir=Path(temporary, 'cache'),
                allow_patterns=list(PUBLISHED),
                token=token,
            ))
        different = [path.name for path in staged.iterdir() if not _same(path, fetched / path.name)]
    if different:
        raise RuntimeError(
            f'{repo_id} was written, but gives back something else for {", ".join(different)}: push again, and do not '
            f'use what is there now ({commit.commit_url}).')
    return commit.pr_url or commit.commit_url


@dataclass
class Pulled:
    """What came from the Hub.

    Args:
        folder: Where it is.
        model: Built and loaded from there.
        commit: What was fetched.
        verified: The files were compared with the Hub's hashes; not so without network.
    """
    folder: Path
    model: nn.Module
    commit: str
    verified: bool


def pull(
        repo_id: str,
        output: Union[str, Path, None] = None,
        revision: Optional[str] = None,
        allow_pickle: bool = False,
        token: Optional[str] = None,
) -> Pulled:
    """Fetches an AWM model from the Hub, compares every file with its hash there and loads the model.

    Args:
        repo_id: Owner/name.
        output: New folder; if not given, the model stays in the Hub's cache.
        revision: Branch, tag, commit or pull request (refs/pr/1); the main branch if not given.
        allow_pickle: Take weights in pickle form where there are no safetensors; they are read with
            `weights_only=True` and written as safetensors.
        token: If it is not the one that `hf auth login` has stored.

    Raises:
        FileExistsError: The output exists.
        RuntimeError: The Hub cannot be reached, refuses, has no such model, or what came is damaged.
        ValueError: What came does not fit together, or allow_pickle without an output.
    """
    output = None if output is None else Path(output)
    if output is not None and output.exists():
        raise FileExistsError(f'{output} exists already: choose another folder with --output.')
    if allow_pickle and output is None:
        raise ValueError('Weights in pickle form are rewritten as safetensors, which needs a folder: --output.')
    wanted = [*PUBLISHED, PICKLE] if allow_pickle else list(PUBLISHED)
    api = HfApi(token=token, library_name='timm_awm', library_version=__version__)
    verified = not constants.HF_HUB_OFFLINE
    with _hub(repo_id):
        cached = Path(snapshot_download(
            repo_id, revision=revision, allow_patterns=wanted, local_files_only=not verified, token=token))
        commit = cached.name
        tree = list(api.list_repo_tree(repo_id, revision=commit)) if verified else []
    infos = [entry for entry in tree if isinstance(entry, RepoFile) and entry.path in wanted]
    _check_names(repo_id, [info.path for info in infos] if verified else os.listdir(cached), allow_pickle)
    _verify(cached, infos)
    if output is None:
        return Pulled(cached, load_folder(cached), commit, verified)
    with new_folder(output) as partial:
        for name in PUBLISHED:
            if (cached / name).is_file():
                shutil.copyfile(cached / name, partial / name)
        if not (partial / SAFETENSORS).is_file() and allow_pickle:
            try:
                weights = torch.load(cached / PICKLE, map_location='cpu', weights_only=True)
            except (UnpicklingError, RuntimeError, EOFError) as error:
                raise ValueError(f'{PICKLE} is damaged or holds more than weights: {error}') from error
            save_file(weights, partial / SAFETENSORS)
        model = load_folder(partial)
    return Pulled(output, model, commit, verified)


def _check_names(repo_id: str, names: List[str], allow_pickle: bool) -> None:
    if CONFIG not in names:
        raise RuntimeError(f'{repo_id} is no model of timm, or not wholly in the cache: there is no {CONFIG}.')
    if SAFETENSORS not in names and not (allow_pickle and PICKLE in names):
        raise RuntimeError(
            f'{repo_id} has no {SAFETENSORS}, or not in the cache. Weights in pickle form are read, with '
            f'weights_only=True, if --allow-pickle asks for them.')


def _verify(folder: Path, infos: List[RepoFile]) -> None:
    """Compares files in the Hub's cache with their hashes, and removes the damaged ones."""
    damaged: List[str] = []
    for info in infos:
        path = folder / info.path
        with path.open('rb') as file:
            whole = (
                sha_fileobj(file).hex() == info.lfs.sha256 if info.lfs else git_hash(file.read()) == info.blob_id)
        if not whole:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            damaged.append(info.path)
    if damaged:
        raise RuntimeError(
            f'{", ".join(damaged)} came damaged from the Hub, and has been removed from the cache: try again.')


def _same(one: Path, other: Path) -> bool:
    if one.suffix != '.safetensors':
        return other.is_file() and one.read_bytes() == other.read_bytes()
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


@contextmanager
def _hub(repo_id: str) -> Iterator[None]:
    """Turns whatever the Hub's client raises, which differs between versions, into errors that say what to do."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(_explained(repo_id, error)) from error


def _explained(repo_id: str, error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return f'{repo_id} is gated: accept its terms on its page on the Hub, then hf auth login with that account.'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo_id} has no such revision.'
    if isinstance(error, RepositoryNotFoundError):
        return f'There is no {repo_id} on the Hub, or it is private and not for your token: hf auth login.'
    if isinstance(error, LocalEntryNotFoundError):
        if isinstance(error.__cause__, HfHubHTTPError):  # the Hub did answer
            return _explained(repo_id, error.__cause__)
        return f'{repo_id} is not in the cache, and there is no way to the Hub: {error}'
    if isinstance(error, HfHubHTTPError):
        advice = {
            401: 'The Hub does not accept the token: hf auth login.',
            403: f'The token may not write to {repo_id}: make one with write permission, then hf auth login.',
        }
        status = error.response.status_code if error.response is not None else 0
        return f'{advice.get(status, "Try again.")} ({error})'
    if isinstance(error, OfflineModeIsEnabled):
        return 'The Hub is not asked, for HF_HUB_OFFLINE is set.'
    return f'{type(error).__name__} while talking to the Hub: {error}. Try again.'
