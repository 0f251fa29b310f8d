"""Hub folders and the page for them, published on the Hugging Face Hub."""
import re
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from .. import __version__
from ..models.checkpoint import SAFETENSORS
from .card import CARD, OWNER
from .folder import CONFIG, REFERENCE, load_folder

__all__ = ['push', 'push_space']

PUBLISHED = [SAFETENSORS, CONFIG, CARD, REFERENCE, 'args.yaml', 'summary.csv']
PACKAGE = Path(__file__).parents[1]
APP = """\
from timm_awm.explore import explore

explore(['hf-hub:{repo_id}'], host='0.0.0.0')
"""
SPACE_CARD = """\
---
title: Inside {name}
sdk: gradio
python_version: '3.12'
app_file: app.py
license: apache-2.0
models:
- {repo_id}
---

Which paths does a network with active weighted mapping take for a picture? The page of `timm-awm explore` for
[{repo_id}](https://huggingface.co/{repo_id}).
"""


def push(
        folder: Union[str, Path],
        repo_id: str,
        private: bool = True,
        revision: Optional[str] = None,
        create_pr: bool = False,
        replace_card: bool = False,
) -> str:
    """Publishes a Hub folder in one commit, which also deletes what is left of earlier weights.

    Nothing is uploaded if the folder's model cannot be built and loaded. A repository that does not exist is created;
    one that exists keeps its visibility, its card and its other files. Given again after a failure, it completes.

    Args:
        folder: Hub folder, as `save_for_hub` and `export_run` write it.
        repo_id: Owner/name, or a name alone for the owner of the token.
        private: Visibility of a new repository.
        revision: Branch, created if it does not exist; the main branch if not given.
        create_pr: Open a pull request instead of committing to the branch.
        replace_card: Replace a README.md that is there, which people may have edited.

    Returns:
        Address of the commit or the pull request.

    Raises:
        FileNotFoundError: The folder has no card.
        ValueError: The folder does not hold a whole model, or no repository can have this name.
        RuntimeError: The Hub cannot be reached, or refuses.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    load_folder(folder)
    card = (folder / CARD).read_text(encoding='utf-8')
    files: Dict[str, Any] = {name: folder / name for name in PUBLISHED if (folder / name).is_file()}
    api = HfApi(library_name='timm_awm', library_version=__version__)
    with _hub():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # not those of base models
        files[CARD] = re.sub(rf'hf-hub:{OWNER}/[\w.-]+', f'hf-hub:{repo_id}', card).encode()
        return _commit(
            api,
            repo_id,
            files,
            ours=PUBLISHED,
            keep_card_with=None if replace_card else CARD,
            revision=revision,
            create_pr=create_pr,
            commit_message=f'{folder.resolve().name}, by timm-awm push',
        )


def push_space(repo_id: str, private: bool = True, replace_card: bool = False) -> str:
    """Publishes the page of `timm-awm explore` for a model on the Hub, as a Space of the same name that holds the
    sources of this package.

    Args:
        repo_id: Of the model, as for `push`.
        private: Visibility of a new Space. One of a private model needs a secret HF_TOKEN that may read it.
        replace_card: Replace its README.md, which people may have edited.

    Returns:
        Address of the commit.

    Raises:
        ValueError: No Space can have this name.
        RuntimeError: The Hub cannot be reached, or refuses.
    """
    validate_repo_id(repo_id)
    sources = [path for path in PACKAGE.rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    files: Dict[str, Any] = {path.relative_to(PACKAGE.parent).as_posix(): path for path in sources}
    needed = [line.partition('; extra == ') for line in requires('timm-awm') or []]
    files['requirements.txt'] = '\n'.join(
        name for name, _, extra in needed
        if not name.startswith('timm-awm') and extra.strip('\'"') in ('', 'analysis', 'explore')).encode()
    api = HfApi(library_name='timm_awm', library_version=__version__)
    with _hub():
        space = api.create_repo(repo_id, repo_type='space', space_sdk='gradio', private=private, exist_ok=True).repo_id
        files['app.py'] = APP.format(repo_id=space).encode()
        files[CARD] = SPACE_CARD.format(repo_id=space, name=space.rpartition('/')[2]).encode()
        return _commit(
            api,
            space,
            files,
            ours=[f'{PACKAGE.name}/*'],
            keep_card_with=None if replace_card else 'app.py',  # without it, the card is the Hub's, of a new Space
            repo_type='space',
            commit_message='The page of timm-awm explore',
        )


def _commit(
        api: HfApi,
        repo_id: str,
        files: Dict[str, Any],
        ours: List[str],
        keep_card_with: Optional[str],
        repo_type: Optional[str] = None,
        revision: Optional[str] = None,
        **kwargs: Any,
) -> str:
    """Commits files, paths or contents by their names; deletes others of our patterns; returns the address."""
    there = list(api.list_repo_files(repo_id, repo_type=repo_type, revision=revision))
    if keep_card_with in there:
        del files[CARD]
        print(f'{repo_id} keeps its {CARD}, even if that is of earlier weights; --replace-card replaces it.')
    stale = set(filter_repo_objects(there, allow_patterns=ours)) - files.keys() - {CARD}
    operations: List[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
    operations += map(CommitOperationDelete, stale)
    commit = api.create_commit(repo_id, operations, repo_type=repo_type, revision=revision, **kwargs)
    return commit.pr_url or commit.commit_url


@contextmanager
def _hub() -> Iterator[None]:
    """Turns what the Hub's client and its connection raise into a RuntimeError with the advice that fits."""
    try:
        yield
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        advice = '\nTry again.'
        if status in (401, 403, 404):
            advice = '\nLog in with a token that may write there: hf auth login.'
        elif 400 <= status < 500 and status != 429 or isinstance(error, OfflineModeIsEnabled):
            advice = ''  # the message has it
        raise RuntimeError(f'{type(error).__name__}: {error}{advice}') from error
