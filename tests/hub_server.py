"""A double of the Hugging Face Hub, in memory, for the real huggingface_hub client. All files are small to it: they
travel within the commit, and are sent as they are. Statuses, codes and messages of errors are the Hub's.
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
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKENS = {'hf_me': 'me', 'hf_you': 'you'}  # the users, who may write in the namespace of their name

Answer = Tuple[int, Dict[str, str], bytes]  # status, headers, body


@dataclass
class Repo:
    """A repository: the files of its branches, pull requests (refs/pr/1) included, and the number of commits to it."""
    private: bool = False
    branches: Dict[str, Dict[str, bytes]] = field(default_factory=lambda: {'main': {}})
    commits: int = 0


class HubServer:
    """The server, as a context manager."""

    def __init__(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.requests: List[Tuple[str, str]] = []  # method, path with query
        self.faults: List[Tuple[str, str, int]] = []  # method, regular expression, status to answer the next one with
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
        """Makes it the Hub for this process, which is logged in as `me`."""
        template = self.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        for name, value in dict(
                ENDPOINT=self.endpoint, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_CACHE=str(cache),
                HF_HUB_OFFLINE=False).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', 'hf_me')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')

    def create_repo(self, repo_id: str, files: Optional[Dict[str, bytes]] = None, private: bool = False) -> Repo:
        self.repos[repo_id] = Repo(private, {'main': dict(files or {})})
        return self.repos[repo_id]


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = '') -> None:
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.answer = _json({'error': message}, status, headers)


def _json(value: Any, status: int = 200, headers: Optional[Dict[str, str]] = None) -> Answer:
    return status, {'Content-Type': 'application/json', **(headers or {})}, json.dumps(value).encode()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()  # as git has it


_ROUTES: List[Tuple[str, 're.Pattern[str]', Callable[..., Answer]]] = []


def _route(method: str, path: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Registers what answers a path, whose {names} become arguments."""
    parts = dict(repo_id='(?:spaces/)?[^/]+/[^/]+?', path='.+')
    pattern = re.sub(r'{(\w+)}', lambda m: f'(?P<{m[1]}>{parts.get(m[1], "[^/]+")})', path)

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # connections are kept
    disable_nagle_algorithm = True

    def serve(self) -> None:
        self.hub: HubServer = self.server.hub
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))  # even of what is refused
        self.hub.requests.append((self.command, self.path))
        try:
            status, headers, body = self.answer()
        except _Refusal as refusal:
            status, headers, body = refusal.answer
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = serve

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> Answer:
        for fault in self.hub.faults:
            if fault[0] == self.command and re.search(fault[1], self.path):
                self.hub.faults.remove(fault)
                raise _Refusal(fault[2], 'Fault')
        authorization = self.headers.get('Authorization')
        self.user = authorization and TOKENS.get(authorization.removeprefix('Bearer '))
        if authorization and not self.user:
            raise _Refusal(401, 'Invalid credentials in Authorization header')
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = url.path.replace('/api/spaces/', '/api/models/spaces/')
        for method, pattern, function in _ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command.replace('HEAD', 'GET'):
                return function(self, **{k: unquote(v) for k, v in match.groupdict().items()})
        raise _Refusal(404, 'Not Found')

    def find(self, repo_id: str, revision: str = 'main', write: bool = False) -> Tuple[Repo, Dict[str, bytes]]:
        """A repository and its files at a revision, if the user may have them."""
        repo, owner = self.hub.repos.get(repo_id), repo_id.removeprefix('spaces/').split('/')[0] == self.user
        if repo is None or repo.private and not owner or write and not self.user:
            raise _Refusal(404 if self.user else 401, 'Repository not found', 'RepoNotFound')
        if write and not owner and 'create_pr' not in self.query:
            raise _Refusal(403, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request')
        by_commit = {_commit_id(files): files for files in repo.branches.values()}
        files = repo.branches.get(revision, by_commit.get(revision))
        if files is None:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo, files

    @_route('POST', '/api/repos/create')
    def create_repo(self) -> Answer:
        asked = json.loads(self.body)
        namespace = asked.get('organization') or self.user
        if namespace != self.user:
            raise _Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = ('spaces/' if asked.get('type') == 'space' else '') + f'{namespace}/{asked["name"]}'
        answer = dict(url=f'{self.hub.endpoint}/{repo_id}')
        if repo_id in self.hub.repos:
            return _json({**answer, 'error': 'You already created this model repo'}, 409)
        files = {'.gitattributes': b'', **({'README.md': b'---\nsdk: gradio\n---\n'} if 'sdk' in asked else {})}
        # huggingface_hub 1.0 sends `private`, 2.4 `visibility`
        self.hub.create_repo(repo_id, files, bool(asked.get('private')) or asked.get('visibility') == 'private')
        return _json(answer)

    @_route('POST', '/api/models/{repo_id}/branch/{branch}')
    def create_branch(self, repo_id: str, branch: str) -> Answer:
        repo, files = self.find(repo_id, write=True)
        repo.branches[branch] = dict(files)
        return _json({})

    @_route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> Answer:
        return _json(dict(errors=[], warnings=[]))

    @_route('POST', '/api/models/{repo_id}/preupload/{revision}')
    def preupload(self, repo_id: str, revision: str) -> Answer:
        _, files = self.find(repo_id, revision, write=True)
        return _json(dict(files=[  # the client skips what has not changed
            dict(path=path, uploadMode='regular', shouldIgnore=False, oid=path in files and _sha1(files[path]) or None)
            for path in (asked['path'] for asked in json.loads(self.body)['files'])]))

    @_route('POST', '/api/models/{repo_id}/commit/{revision}')
    def commit(self, repo_id: str, revision: str) -> Answer:
        repo, files = self.find(repo_id, revision, write=True)
        files, url, answer = dict(files), f'{self.hub.endpoint}/{repo_id}', {}
        for line in map(json.loads, self.body.splitlines()):
            if line['key'] == 'file':
                files[line['value']['path']] = base64.b64decode(line['value']['content'])
            elif line['key'] == 'deletedFile':
                del files[line['value']['path']]
        if 'create_pr' in self.query:
            revision, answer['pullRequestUrl'] = 'refs/pr/1', f'{url}/discussions/1'
        repo.branches[revision], repo.commits = files, repo.commits + 1
        oid = _commit_id(files)
        return _json({**answer, 'success': True, 'commitOid': oid, 'commitUrl': f'{url}/commit/{oid}'})

    @_route('GET', '/api/models/{repo_id}')
    @_route('GET', '/api/models/{repo_id}/revision/{revision}')
    def info(self, repo_id: str, revision: str = 'main') -> Answer:
        repo, files = self.find(repo_id, revision)
        siblings = [dict(rfilename=path) for path in files]
        return _json(dict(id=repo_id, sha=_commit_id(files), private=repo.private, tags=[], siblings=siblings))

    @_route('GET', '/api/models/{repo_id}/tree/{revision}')
    def tree(self, repo_id: str, revision: str) -> Answer:
        _, files = self.find(repo_id, revision)
        return _json([
            dict(type='file', path=path, size=len(content), oid=_sha1(content)) for path, content in files.items()])

    @_route('GET', '/{repo_id}/resolve/{revision}/{path}')
    def resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        _, files = self.find(repo_id, revision)
        if path not in files:
            raise _Refusal(404, 'Entry not found', 'EntryNotFound')
        return 200, {'X-Repo-Commit': _commit_id(files), 'ETag': f'"{_sha1(files[path])}"'}, files[path]


def _commit_id(files: Dict[str, bytes]) -> str:
    return _sha1(repr(sorted((path, _sha1(content)) for path, content in files.items())).encode())
