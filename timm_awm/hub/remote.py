"""Hub folders and the page for them, published on the Hugging Face Hub."""
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from .. import __version__
from ..models.checkpoint import SAFETENSORS
from .card import CARD, OWNER
from .folder import CONFIG, REFERENCE, load_folder

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


def push(folder: Union[str, Path], repo_id: str, private: bool = True, replace_card: bool = False) -> str:
    """Publishes a Hub folder in one commit, which also deletes what is left of earlier weights.

    Nothing is uploaded if the folder's model cannot be built and loaded. A repository that does not exist is created;
    one that exists keeps its visibility, its card and its other files.

    Args:
        folder: Hub folder, as `save_for_hub` and `export_run` write it.
        repo_id: Owner/name.
        private: Visibility of a new repository.
        replace_card: Replace a README.md that is there, which people may have edited.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: The folder has no card.
        ValueError: The folder does not hold a whole model, or no repository can have this name.
        RuntimeError: The Hub cannot be reached, or refuses.
    """
    load_folder(folder)
    files: Dict[str, Any] = {path.name: path for path in Path(folder).iterdir() if path.name in PUBLISHED}
    card = (Path(folder) / CARD).read_text(encoding='utf-8')
    files[CARD] = re.sub(rf'hf-hub:{OWNER}/[\w.-]+', f'hf-hub:{repo_id}', card).encode()  # not those of base models
    return _publish(repo_id, files, PUBLISHED, None if replace_card else CARD, private=private)


def push_space(repo_id: str, private: bool = True, replace_card: bool = False) -> str:
    """Publishes the page of `timm-awm explore` for a model on the Hub, as a Space of the same name that holds the
    sources of this package.

    Arguments, result and errors are those of `push`. The Space of a private model needs a secret HF_TOKEN that may
    read it.
    """
    sources = [path for path in PACKAGE.rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    files: Dict[str, Any] = {path.relative_to(PACKAGE.parent).as_posix(): path for path in sources}
    needed = [line.partition('; extra == ') for line in requires('timm-awm') or []]
    files['requirements.txt'] = '\n'.join(
        name for name, _, extra in needed
        if not name.startswith('timm-awm') and extra.strip('\'"') in ('', 'analysis', 'explore')).encode()
    files['app.py'] = APP.format(repo_id=repo_id).encode()
    files[CARD] = SPACE_CARD.format(repo_id=repo_id, name=repo_id.rpartition('/')[2]).encode()
    # without app.py, the card is the Hub's, of a new Space
    keep_card_with = None if replace_card else 'app.py'
    return _publish(
        repo_id, files, [f'{PACKAGE.name}/*'], keep_card_with, private=private, repo_type='space', space_sdk='gradio')


def _publish(
        repo_id: str,
        files: Dict[str, Any],
        ours: List[str],
        keep_card_with: Optional[str],
        repo_type: Optional[str] = None,
        **new_repo: Any,
) -> str:
    """Commits files, paths or contents by their names; deletes others of our patterns; returns the address."""
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise ValueError(f'Whose is {repo_id!r}? Name OWNER/{repo_id}.')
    api = HfApi(library_name='timm_awm', library_version=__version__)
    try:
        api.create_repo(repo_id, repo_type=repo_type, exist_ok=True, **new_repo)
        there = api.list_repo_files(repo_id, repo_type=repo_type)
        if keep_card_with in there:
            del files[CARD]
            print(f'{repo_id} keeps its {CARD}, even if that is of earlier weights; --replace-card replaces it.')
        stale = set(filter_repo_objects(there, allow_patterns=ours)) - files.keys() - {CARD}
        operations: List[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
        operations += map(CommitOperationDelete, stale)
        return api.create_commit(repo_id, operations, commit_message='timm-awm push', repo_type=repo_type).commit_url
    except Exception as error:  # the client's, its connection's
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        advice = '\nTry again.'
        if status in (401, 403, 404):
            advice = '\nLog in with a token that may write there: hf auth login.'
        elif 400 <= status < 500 and status != 429 or isinstance(error, OfflineModeIsEnabled):
            advice = ''  # the message has it
        raise RuntimeError(f'{type(error).__name__}: {error}{advice}') from error
