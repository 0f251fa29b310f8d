"""A double of the Hugging Face Hub, in memory, for the real huggingface_hub client, whose user is `me`. All files are
small to it: they travel within the commit, and are sent as they are. Statuses, codes and messages are the Hub's.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

Answer = Tuple[int, Dict[str, str], bytes]  # status, headers, body
REQUEST = re.compile(  # about a repository
    '(?:/api/models)?/(?P<repo_id>(?:spaces/)?[^/]+/[^/]+)/(?P<what>preupload|commit|revision|tree|resolve)/'
    '(?P<revision>[^/]+)/?(?P<path>.*)')


@dataclass
class Repo:
    """A repository: the files of its main branch, and the number of commits to it."""
    files: Dict[str, bytes]
    private: bool = False
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
        self.repos[repo_id] = Repo(dict(files or {}), private)
        return self.repos[repo_id]

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        self.requests.append(f'{method} {path}')
        for fault in self.faults:
            if re.search(fault[0], self.requests[-1]):
                self.faults.remove(fault)
                return _refuse(fault[1], 'Fault')
        if path == '/api/repos/create':
            return self._create(json.loads(body))
        if path == '/api/validate-yaml':
            return _json(dict(errors=[], warnings=[]))
        match = REQUEST.fullmatch(path.replace('/api/spaces/', '/api/models/spaces/'))
        if not match:
            return _refuse(404, 'Not Found')
        repo_id, what, revision, path = match.groups()
        repo = self.repos.get(repo_id)
        if not repo:
            return _refuse(404, 'Repository not found', 'RepoNotFound')
        commit_id = _sha1(repr(sorted((path, _sha1(content)) for path, content in repo.files.items())).encode())
        if revision not in ('main', commit_id):
            return _refuse(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        if what == 'preupload':
            return _json(dict(files=[dict(  # the client skips what has not changed
                path=path, uploadMode='regular', shouldIgnore=False,
                oid=_sha1(repo.files[path]) if path in repo.files else None,
            ) for path in (asked['path'] for asked in json.loads(body)['files'])]))
        if what == 'commit':
            return self._commit(repo_id, repo, body)
        if what == 'revision':
            siblings = [dict(rfilename=path) for path in repo.files]
            return _json(dict(id=repo_id, sha=commit_id, private=repo.private, tags=[], siblings=siblings))
        if what == 'tree':
            return _json([dict(type='file', path=path, size=len(content), oid=_sha1(content))
                          for path, content in repo.files.items()])
        if path not in repo.files:
            return _refuse(404, 'Entry not found', 'EntryNotFound')
        return 200, {'X-Repo-Commit': commit_id, 'ETag': f'"{_sha1(repo.files[path])}"'}, repo.files[path]

    def _create(self, asked: Dict[str, Any]) -> Answer:
        owner, is_space = asked['organization'], asked.get('type') == 'space'
        repo_id = f'{"spaces/" * is_space}{owner}/{asked["name"]}'
        answer = dict(url=f'{self.endpoint}/{repo_id}')
        if repo_id in self.repos:
            return _json({**answer, 'error': 'You already created this model repo'}, 409)
        if owner != 'me':
            return _refuse(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        files = {'.gitattributes': b'', **({'README.md': b'---\nsdk: gradio\n---\n'} if is_space else {})}
        # huggingface_hub 1.0 sends `private`, 2.4 `visibility`
        self.create_repo(repo_id, files, bool(asked.get('private')) or asked.get('visibility') == 'private')
        return _json(answer)

    def _commit(self, repo_id: str, repo: Repo, body: bytes) -> Answer:
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file':
                repo.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            elif line['key'] == 'deletedFile':
                del repo.files[line['value']['path']]
        repo.commits += 1
        return _json(dict(success=True, commitOid='1', commitUrl=f'{self.endpoint}/{repo_id}/commit/1'))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # connections are kept
    disable_nagle_algorithm = True

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))  # even of what is refused
        status, headers, body = self.server.hub.answer(self.command, unquote(urlsplit(self.path).path), body)
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = serve

    def log_message(self, *_: Any) -> None:
        pass


def _json(value: Any, status: int = 200) -> Answer:
    return status, {'Content-Type': 'application/json'}, json.dumps(value).encode()


def _refuse(status: int, message: str, code: str = '') -> Answer:
    return status, {'X-Error-Message': message, 'X-Error-Code': code}, b''


def _sha1(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()  # git's own
