"""A double of the Hugging Face Hub, in memory, that speaks the Hub's protocol to the real huggingface_hub client.

    with HubServer({'hf_me': 'me'}) as hub:
        hub.create_repo('me/model', files={'config.json': b'{}'})
        subprocess.run([sys.executable, '-c', code], env=hub.client_env(tmp_path / 'home'))

Clients run in subprocesses, since HF_ENDPOINT is read at import. Statuses, codes and messages of errors are the Hub's.
One differs: a 401 for a repository has the code RepoNotFound, without which the client would raise
RepositoryNotFoundError over https only.
"""
import base64
import hashlib
import json
import os
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = ('.safetensors', '.bin')

Answer = Tuple[int, Dict[str, str], bytes]  # status, headers, body


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind.

    Args:
        method: HTTP method.
        path: Regular expression, searched for in path and query. LFS files are sent from /cdn/{repo}/{sha256}/{path}
            and uploaded to /cdn/{repo}/{sha256}.
        action: Instead of what was asked for, an HTTP status, or 'close', which ends the connection without an answer.
            After what was asked for, 'truncate', which ends the connection after half of the answer's body.
        times: How many requests it has yet to happen to.
    """
    method: str
    path: str
    action: Union[int, str]
    times: int = 1


@dataclass
class Repo:
    """A repository. Its branches, pull requests (refs/pr/1) included, name commits, each of which has all its files."""
    private: bool = False
    branches: Dict[str, str] = field(default_factory=dict)
    commits: Dict[str, Dict[str, bytes]] = field(default_factory=dict)
    objects: Dict[str, bytes] = field(default_factory=dict)  # contents by SHA-256, committed or only uploaded

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        """Content by path at a branch, pull request or commit."""
        return self.commits[self.branches.get(revision, revision)]

    def commit(
            self,
            changes: Dict[str, Optional[bytes]],
            revision: str = 'main',
            branch: Optional[str] = None,
    ) -> str:
        """Commits new contents by path, of which None deletes; returns the commit's id.

        Args:
            revision: The parent.
            branch: What moves to the new commit, `revision` if not given.
        """
        files = {k: v for k, v in {**self.files(revision), **changes}.items() if v is not None}
        self.objects.update((_sha256(content), content) for content in files.values())
        oid = secrets.token_hex(20)
        self.commits[oid] = files
        self.branches[branch or revision] = oid
        return oid


class HubServer:
    """The server, as a context manager.

    Args:
        tokens: User by token. A user may write in the namespace that bears the user's name.
    """

    def __init__(self, tokens: Dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: Dict[str, Repo] = {}
        self.requests: List[Tuple[str, str]] = []  # method, path with query
        self.faults: List[Fault] = []
        self.altered: Dict[str, bytes] = {}  # what is sent in place of a content, by the content's SHA-256
        self.lock = threading.Lock()
        # The CDN needs a host of its own: the client looks for X-Repo-Commit behind a redirect within the Hub.
        self._servers = [ThreadingHTTPServer(('127.0.0.1', 0), _Handler) for _ in range(2)]
        self.endpoint, self.cdn = (
            f'http://{host}:{server.server_port}' for host, server in zip(('127.0.0.1', 'localhost'), self._servers))

    def __enter__(self) -> 'HubServer':
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def clear(self) -> None:
        """Forgets repositories, faults and requests."""
        for kept in (self.repos, self.faults, self.altered, self.requests):
            kept.clear()

    def client_env(self, home: Path) -> Dict[str, str]:
        """The environment for a client whose HF_HOME is `home`."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
        env.update({k: '127.0.0.1,localhost' for k in ('NO_PROXY', 'no_proxy')})
        env.update(HF_ENDPOINT=self.endpoint, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY='1')
        env['HF_HUB_DISABLE_XET'] = '1'  # with hf-xet, nothing would be uploaded as LFS
        return env

    def create_repo(
            self,
            repo_id: str,
            private: bool = False,
            files: Optional[Dict[str, bytes]] = None,
    ) -> Repo:
        """Creates a repository with the Hub's initial commit, and `files` in a second one."""
        initial = {'.gitattributes': b'*.bin filter=lfs -text\n*.safetensors filter=lfs -text\n'}
        oid = secrets.token_hex(20)
        repo = self.repos[repo_id] = Repo(private, branches={'main': oid}, commits={oid: initial})
        if files:
            repo.commit(files)
        return repo

    def corrupt(self, repo_id: str, path: str, revision: str = 'main') -> None:
        """From now on alters the last byte whenever this file is sent; size and hashes stay those of the true one."""
        content = self.repos[repo_id].files(revision)[path]
        self.altered[_sha256(content)] = content[:-1] + bytes([content[-1] ^ 1])


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = '', **headers: str) -> None:
        headers = {**headers, 'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.answer = _json({'error': message}, status, headers)


def _json(value: Any, status: int = 200, headers: Optional[Dict[str, str]] = None) -> Answer:
    return status, {'Content-Type': 'application/json', **(headers or {})}, json.dumps(value).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(path: str, content: bytes) -> Dict[str, Any]:
    """A file as the Hub lists it; `oid` is that of git, which of an LFS file knows the pointer."""
    entry: Dict[str, Any] = dict(type='file', path=path, size=len(content))
    if path.endswith(LFS_SUFFIXES):
        oid, size = _sha256(content), len(content)
        content = f'version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n'.encode()
        entry['lfs'] = dict(oid=oid, size=size, pointerSize=len(content))
    return {**entry, 'oid': hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()}


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
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        with self.hub.lock:  # one request at a time
            self.hub.requests.append((self.command, self.path))
            action = self.action()
            if action == 'close':
                self.close_connection = True
                return
            try:
                if isinstance(action, int):
                    raise _Refusal(action, 'Fault')
                status, headers, body = self.answer(url.path)
            except _Refusal as refusal:
                status, headers, body = refusal.answer
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = action == 'truncate'
        if self.command != 'HEAD':
            self.wfile.write(body[:len(body) // 2] if cut else body)
        self.close_connection |= cut

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *_: Any) -> None:
        pass

    def action(self) -> Union[int, str, None]:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                fault.times -= 1
                return fault.action
        return None

    def answer(self, path: str) -> Answer:
        authorization = self.headers.get('Authorization')
        self.user = authorization and self.hub.tokens.get(authorization.removeprefix('Bearer '))
        if authorization and not self.user:
            raise _Refusal(401, 'Invalid credentials in Authorization header')
        path = path.replace('/api/spaces/', '/api/models/spaces/')
        for method, pattern, function in _ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command.replace('HEAD', 'GET'):
                return function(self, **{k: unquote(v) for k, v in match.groupdict().items()})
        raise _Refusal(404, 'Not Found')

    def logged_in(self, code: str = '') -> str:
        if not self.user:
            raise _Refusal(401, 'Invalid username or password.', code)
        return self.user

    def owns(self, repo_id: str) -> bool:
        return self.user == repo_id.removeprefix('spaces/').split('/')[0]

    def readable(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or repo.private and not self.owns(repo_id):
            self.logged_in('RepoNotFound')  # who is not logged in learns no more
            raise _Refusal(404, 'Repository not found', 'RepoNotFound')
        return repo

    def writable(self, repo_id: str) -> Repo:
        repo = self.readable(repo_id)
        self.logged_in('RepoNotFound')
        if not self.owns(repo_id) and 'create_pr' not in self.query:
            raise _Refusal(403, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request')
        return repo

    def find(self, repo: Repo, revision: str) -> Tuple[str, Dict[str, bytes]]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise _Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return oid, repo.commits[oid]

    @_route('POST', '/api/repos/create')
    def create_repo(self) -> Answer:
        user, asked = self.logged_in(), json.loads(self.body)
        namespace = asked.get('organization') or user
        if namespace != user:
            raise _Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f'{namespace}/{asked["name"]}'
        if asked.get('type') == 'space':
            repo_id = f'spaces/{repo_id}'
        answer = dict(url=f'{self.hub.endpoint}/{repo_id}')
        if repo_id in self.hub.repos:
            return _json({**answer, 'error': 'You already created this model repo'}, 409)
        # huggingface_hub 1.0 sends `private`, 2.4 `visibility`
        self.hub.create_repo(repo_id, private=bool(asked.get('private')) or asked.get('visibility') == 'private')
        return _json(answer)

    @_route('POST', '/api/models/{repo_id}/branch/{branch}')
    def create_branch(self, repo_id: str, branch: str) -> Answer:
        repo = self.writable(repo_id)
        repo.branches[branch], _ = self.find(repo, json.loads(self.body).get('startingPoint', 'main'))
        return _json({})

    @_route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> Answer:
        return _json(dict(errors=[], warnings=[]))

    @_route('POST', '/api/models/{repo_id}/preupload/{revision}')
    def preupload(self, repo_id: str, revision: str) -> Answer:
        _, files = self.find(self.writable(repo_id), revision)
        answer = []
        for path in (asked['path'] for asked in json.loads(self.body)['files']):
            entry = _entry(path, files.get(path, b''))
            answer.append(dict(path=path, uploadMode='lfs' if 'lfs' in entry else 'regular', shouldIgnore=False))
            if path in files:  # the client skips what has not changed
                answer[-1]['oid'] = entry.get('lfs', entry)['oid']
        return _json(dict(files=answer))

    @_route('POST', '/{repo_id}.git/info/lfs/objects/batch')
    def lfs_batch(self, repo_id: str) -> Answer:
        repo, asked = self.readable(repo_id), json.loads(self.body)
        objects = [dict(oid=item['oid'], size=item['size']) for item in asked['objects']]
        for item in objects:
            if item['oid'] not in repo.objects:
                item['actions'] = dict(upload=dict(href=f'{self.hub.cdn}/cdn/{repo_id}/{item["oid"]}'))
        return _json(dict(transfer='basic', objects=objects))

    @_route('PUT', '/cdn/{repo_id}/{oid}')
    def lfs_upload(self, repo_id: str, oid: str) -> Answer:
        self.hub.repos[repo_id].objects[oid] = self.body
        return 200, {}, b''

    @_route('POST', '/api/models/{repo_id}/commit/{revision}')
    def commit(self, repo_id: str, revision: str) -> Answer:
        repo = self.writable(repo_id)
        _, files = self.find(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes: Dict[str, Optional[bytes]] = {}
        for key, value in ((line['key'], line['value']) for line in lines):
            if key == 'header':
                continue
            if key == 'file':
                changes[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile' and value['oid'] in repo.objects:
                changes[value['path']] = repo.objects[value['oid']]
            elif key == 'deletedFile' and value['path'] in files:
                changes[value['path']] = None
            else:
                raise _Refusal(400, f'{key} is not possible: {value["path"]}')
        url, branch, answer = f'{self.hub.endpoint}/{repo_id}', revision, {}
        if 'create_pr' in self.query:
            number = 1 + sum(name.startswith('refs/pr/') for name in repo.branches)
            branch, answer['pullRequestUrl'] = f'refs/pr/{number}', f'{url}/discussions/{number}'
        oid = repo.commit(changes, revision, branch)
        return _json({**answer, 'success': True, 'commitOid': oid, 'commitUrl': f'{url}/commit/{oid}'})

    @_route('GET', '/api/models/{repo_id}')
    @_route('GET', '/api/models/{repo_id}/revision/{revision}')
    def info(self, repo_id: str, revision: str = 'main') -> Answer:
        repo = self.readable(repo_id)
        oid, files = self.find(repo, revision)
        return _json(dict(
            id=repo_id, modelId=repo_id, author=repo_id.split('/')[0], sha=oid, private=repo.private,
            gated=False, disabled=False, downloads=0, likes=0, tags=[],
            siblings=[dict(rfilename=path) for path in files]))

    @_route('GET', '/api/models/{repo_id}/tree/{revision}')
    def tree(self, repo_id: str, revision: str) -> Answer:
        _, files = self.find(self.readable(repo_id), revision)
        return _json([_entry(*item) for item in files.items()])  # recursive, without the folders

    @_route('GET', '/{repo_id}/resolve/{revision}/{path}')
    def resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        repo = self.readable(repo_id)
        oid, files = self.find(repo, revision)
        headers = {'X-Repo-Commit': oid}
        if path not in files:
            raise _Refusal(404, 'Entry not found', 'EntryNotFound', **headers)
        entry = _entry(path, files[path])
        headers['ETag'] = f'"{entry["oid"]}"'
        if 'lfs' not in entry:
            return 200, headers, self.hub.altered.get(_sha256(files[path]), files[path])
        sha256 = entry['lfs']['oid']
        headers.update({'X-Linked-Etag': f'"{sha256}"', 'X-Linked-Size': str(entry['size'])})
        return 302, {**headers, 'Location': f'{self.hub.cdn}/cdn/{repo_id}/{sha256}/{quote(path)}'}, b''

    @_route('GET', '/cdn/{repo_id}/{oid}/{path}')
    def cdn(self, repo_id: str, oid: str, path: str) -> Answer:
        return 200, {'ETag': f'"{oid}"'}, self.hub.altered.get(oid, self.hub.repos[repo_id].objects[oid])
