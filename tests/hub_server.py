"""A double of the Hugging Face Hub, in memory, for the real huggingface_hub client, whose user is `me`. All files are
small to it: they travel within the commit, and are sent as they are. Statuses, codes and messages are the Hub's.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Answer = Tuple[int, Dict[str, str], bytes]  # status, headers, body


@dataclass
class Repo:
    """A repository: the files of its branches, pull requests (refs/pr/1) included, and the number of commits to it."""
    private: bool = False
    branches: Dict[str, Dict[str, bytes]] = field(default_factory=dict)
    commits: int = 0


class HubServer:
    """The server, as a context manager."""

    def __init__(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.requests: List[str] = []  # method and path
        self.faults: List[Tuple[str, int]] = []  # regular expression, and what the next such request is answered with
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self.server.hub = self
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def connect(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Makes it the Hub for this process."""
        monkeypatch.setattr(constants, 'ENDPOINT', self.endpoint)
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', self.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setenv('HF_TOKEN', 'hf_me')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')

    def create_repo(self, repo_id: str, files: Optional[Dict[str, bytes]] = None, private: bool = False) -> Repo:
        self.repos[repo_id] = Repo(private, {'main': dict(files or {})})
        return self.repos[repo_id]


class _Refusal(Exception):
    """Status, message and the Hub's code."""


_ROUTES: List[Tuple['re.Pattern[str]', Callable[..., Answer]]] = []


def _route(request: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Registers what answers a method and path, whose {names} become arguments."""
    parts = dict(repo_id='(?:spaces/)?[^/]+/[^/]+?', path='.+')
    pattern = re.sub(r'{(\w+)}', lambda m: f'(?P<{m[1]}>{parts.get(m[1], "[^/]+")})', request)

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # connections are kept
    disable_nagle_algorithm = True

    def serve(self) -> None:
        self.hub: HubServer = self.server.hub
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))  # even of what is refused
        try:
            status, headers, body = self.answer(f'{self.command} {urlsplit(self.path).path}')
        except _Refusal as refusal:
            status, message, code = refusal.args
            headers, body = {'X-Error-Message': message, 'X-Error-Code': code}, b''
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = serve

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, request: str) -> Answer:
        self.hub.requests.append(request)
        for fault in self.hub.faults:
            if re.search(fault[0], request):
                self.hub.faults.remove(fault)
                raise _Refusal(fault[1], 'Fault', '')
        request = request.replace('HEAD', 'GET').replace('/api/spaces/', '/api/models/spaces/')
        for pattern, function in _ROUTES:
            match = pattern.fullmatch(request)
            if match:
                return function(self, **{k: unquote(v) for k, v in match.groupdict().items()})
        raise _Refusal(404, 'Not Found', '')

    def find(self, repo_id: str, revision: str = 'main') -> Tuple[Repo, Dict[str, bytes]]:
        """A repository and its files at a branch or commit."""
        if repo_id not in self.hub.repos:
            raise _Refusal(404, 'Repository not found', 'RepoNotFound')
        repo = self.hub.repos[repo_id]
        revisions = {**{_commit_id(files): files for files in repo.branches.values()}, **repo.branches}
        if revision not in revisions:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo, revisions[revision]

    @_route('POST /api/repos/create')
    def create_repo(self) -> Answer:
        asked = json.loads(self.body)
        owner, is_space = asked.get('organization') or 'me', asked.get('type') == 'space'
        repo_id = f'{"spaces/" * is_space}{owner}/{asked["name"]}'
        answer = dict(url=f'{self.hub.endpoint}/{repo_id}')
        if repo_id in self.hub.repos:
            return _json({**answer, 'error': 'You already created this model repo'}, 409)
        if owner != 'me':
            raise _Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"', '')
        files = {'.gitattributes': b'', **({'README.md': b'---\nsdk: gradio\n---\n'} if is_space else {})}
        # huggingface_hub 1.0 sends `private`, 2.4 `visibility`
        self.hub.create_repo(repo_id, files, bool(asked.get('private')) or asked.get('visibility') == 'private')
        return _json(answer)

    @_route('POST /api/models/{repo_id}/branch/{branch}')
    def create_branch(self, repo_id: str, branch: str) -> Answer:
        repo, files = self.find(repo_id)
        repo.branches[branch] = dict(files)
        return _json({})

    @_route('POST /api/validate-yaml')
    def validate_yaml(self) -> Answer:
        return _json(dict(errors=[], warnings=[]))

    @_route('POST /api/models/{repo_id}/preupload/{revision}')
    def preupload(self, repo_id: str, revision: str) -> Answer:
        _, files = self.find(repo_id, revision)
        return _json(dict(files=[  # the client skips what has not changed
            dict(path=path, uploadMode='regular', shouldIgnore=False, oid=path in files and _sha1(files[path]) or None)
            for path in (asked['path'] for asked in json.loads(self.body)['files'])]))

    @_route('POST /api/models/{repo_id}/commit/{revision}')
    def commit(self, repo_id: str, revision: str) -> Answer:
        repo, files = self.find(repo_id, revision)
        files, url, answer = dict(files), f'{self.hub.endpoint}/{repo_id}', {}
        for line in map(json.loads, self.body.splitlines()):
            if line['key'] == 'file':
                files[line['value']['path']] = base64.b64decode(line['value']['content'])
            elif line['key'] == 'deletedFile':
                del files[line['value']['path']]
        if 'create_pr=1' in self.path:
            revision, answer['pullRequestUrl'] = 'refs/pr/1', f'{url}/discussions/1'
        elif not repo_id.removeprefix('spaces/').startswith('me/'):
            raise _Refusal(403, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request', '')
        repo.branches[revision], repo.commits = files, repo.commits + 1
        oid = _commit_id(files)
        return _json({**answer, 'success': True, 'commitOid': oid, 'commitUrl': f'{url}/commit/{oid}'})

    @_route('GET /api/models/{repo_id}/revision/{revision}')
    def info(self, repo_id: str, revision: str) -> Answer:
        repo, files = self.find(repo_id, revision)
        siblings = [dict(rfilename=path) for path in files]
        return _json(dict(id=repo_id, sha=_commit_id(files), private=repo.private, tags=[], siblings=siblings))

    @_route('GET /api/models/{repo_id}/tree/{revision}')
    def tree(self, repo_id: str, revision: str) -> Answer:
        _, files = self.find(repo_id, revision)
        return _json([
            dict(type='file', path=path, size=len(content), oid=_sha1(content)) for path, content in files.items()])

    @_route('GET /{repo_id}/resolve/{revision}/{path}')
    def resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        _, files = self.find(repo_id, revision)
        if path not in files:
            raise _Refusal(404, 'Entry not found', 'EntryNotFound')
        return 200, {'X-Repo-Commit': _commit_id(files), 'ETag': f'"{_sha1(files[path])}"'}, files[path]


def _json(value: Any, status: int = 200) -> Answer:
    return status, {'Content-Type': 'application/json'}, json.dumps(value).encode()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()  # git's own


def _commit_id(files: Dict[str, bytes]) -> str:
    return _sha1(repr(sorted((path, _sha1(content)) for path, content in files.items())).encode())
