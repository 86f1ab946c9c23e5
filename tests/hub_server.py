"""A Hub on loopback: what the `huggingface_hub` client calls to make a repo, commit to it and download from it.

`HubServer` keeps repos in memory. Failures are ordered by `fail_next`; `requests` records what was asked.
`python tests/hub_server.py` serves until it is stopped, to try a push without an account.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
USERS = {WRITER: "user", READER: "reader"}


def git_oid(content: bytes) -> str:
    """SHA-1 of a git blob, by which the client recognises an unchanged file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Commits are whole trees, `{path: content}`, by their id; `refs` are branches and pull requests."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Serve on a port, a free one if 0, until the `with` block ends."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[str, str, str]] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def add_repo(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        self.repos[name] = repo = Repo(private)
        repo.commit("main", files, "initial commit")
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.refs[revision]]

    def fail_next(self, method: str, pattern: str, how: str, times: int = 1) -> None:
        """Let the next requests whose path matches `pattern` end by `"cut"` (after half the body) or a status code."""
        self.failures += [(method, pattern, how)] * times

    def count(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((method, url.path))
        for failure in self.hub.failures:
            if failure[0] == method and re.search(failure[1], url.path):
                self.hub.failures.remove(failure)
                return self._fail(failure[2])
        self.body = self._read_body()
        for route_method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if method in route_method and match:
                return action(self, *(unquote(group) for group in match.groups()))
        return self._error(404, "EntryNotFound", f"no such page: {url.path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _fail(self, how: str) -> None:
        if how == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
        else:
            self._read_body()
            self._error(int(how), "", "as ordered")

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self._send(status, content, Content_Type="application/json", X_Error_Code=code, X_Error_Message=message)

    # Who asks

    @property
    def _user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self, name: str) -> bool:
        if self._user is None:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif self._user != name.split("/")[0]:
            self._error(403, "", f"Forbidden: {self._user} has no write access to {name}")
        return self._user == name.split("/")[0]

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._user != name.split("/")[0]):
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self._repo(name)
        if repo is None:
            return None
        sha = repo.resolve(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits[sha]

    # What they ask

    def whoami(self) -> None:
        if self._user is None:
            self._error(401, "", "Invalid username or password.")
        else:
            self._json({"type": "user", "name": self._user, "orgs": []})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or self._user}/{wanted['name']}"
        if name in self.hub.repos:
            self._error(409, "", "You already created this model repo")
        elif self._may_write(name):
            self.hub.add_repo(name, {".gitattributes": b""}, wanted.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}"})

    def validate_card(self) -> None:
        text = json.loads(self.body)["content"]
        errors = [] if text.startswith("---\n") else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, name: str, revision: str = "main") -> None:
        if found := self._tree(name, revision):
            sha, files = found
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": sha, "private": self.hub.repos[name].private, "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        if found := self._tree(name, revision):
            files = {path: data for path, data in found[1].items() if path.startswith(folder and f"{folder}/")}
            if folder and not files:
                self._error(404, "EntryNotFound", f"{folder} does not exist")
            else:
                self._json([_entry(path, data) for path, data in files.items()])

    def create_branch(self, name: str, branch: str) -> None:
        if self._may_write(name) and (repo := self._repo(name)):
            start = repo.resolve(json.loads(self.body or b"{}").get("startingPoint", "main"))
            if branch in repo.refs or start is None:
                self._error(409, "", f"Reference already exists: {branch}")
            else:
                repo.refs[branch] = start
                self._json({})

    def preupload(self, name: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        if (proposed or self._may_write(name)) and (found := self._tree(name, revision)):
            files = []
            for file in json.loads(self.body)["files"]:
                there = found[1].get(file["path"])
                mode = _mode(file["path"])
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
                if there is not None:
                    files[-1]["oid"] = _large_oid(there) if mode == "lfs" else git_oid(there)
            self._json({"files": files})

    def large_batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.hub.large:
                objects[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def upload_large(self, oid: str) -> None:
        if _large_oid(self.body) != oid:
            self._error(400, "", "the content is not what was announced")
        else:
            self.hub.large[oid] = self.body
            self._json({})

    def commit(self, name: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        repo = self._repo(name)
        if repo is None or not (proposed or self._may_write(name)):
            return None
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        base = repo.refs[revision]
        if header["value"].get("parentCommit", base) != base:
            return self._error(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[base])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        sha = repo.commit(f"refs/pr/{number}" if proposed else revision, files, header["value"]["summary"])
        url = f"{self.hub.url}/{name}/discussions/{number}" if proposed else None
        return self._json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": url}
        )

    def download(self, name: str, revision: str, path: str) -> None:
        if found := self._tree(name, revision):
            sha, files = found
            if path not in files:
                return self._error(404, "EntryNotFound", "Entry not found")
            data = files[path]
            oid = _large_oid(data) if _mode(path) == "lfs" else git_oid(data)
            self._send(200, data, ETag=f'"{oid}"', X_Repo_Commit=sha, Accept_Ranges="bytes")
        return None


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def _large_oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if _mode(path) == "lfs":
        entry["lfs"] = {"oid": _large_oid(data), "size": len(data), "pointerSize": 134}
    return entry


_NAME = "([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/branch/([^/]+)", _Handler.create_branch),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", f"/{_NAME}.git/info/lfs/objects/batch", _Handler.large_batch),
    ("PUT", "/large/([0-9a-f]+)", _Handler.upload_large),
    ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.download),
]


if __name__ == "__main__":
    server = HubServer(port=8765)
    print(f"export HF_ENDPOINT={server.url} HF_TOKEN={WRITER} HF_HUB_DISABLE_XET=1", flush=True)
    server.http.serve_forever()
