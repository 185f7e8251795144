"""A Hub on this machine: what huggingface_hub asks of one to make, fill and read repositories.

Answers and error codes are those that huggingface_hub 2.4 reads; files are kept in memory. Large
files go the LFS way, as to the Hub (HF_HUB_DISABLE_XET=1 is set for the tests).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

OWNER_TOKEN, OTHER_TOKEN, READ_TOKEN = "hf_owner", "hf_other", "hf_read"
USERS = {OWNER_TOKEN: "user", OTHER_TOKEN: "other", READ_TOKEN: "user"}
LFS_ENDINGS = (".safetensors", ".bin", ".parquet")
_PARTS = r"/(?P<kind>datasets/)?(?P<repo>[\w.\-]+/[\w.\-]+)"
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[\w.\-]+/[\w.\-]+)(?P<rest>/.*)?")
_RESOLVE = re.compile(_PARTS + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_LFS = re.compile(_PARTS + r"\.git/info/lfs/objects/batch")


@dataclass
class Repository:
    """Its commits by hash, and branches and tags that name them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put files on top of what a branch has; return the new commit."""
        before = self.branches.get(branch, "")
        whole = self.commits.get(before, {}) | files
        digest = hashlib.sha1(before.encode() + repr(sorted(whole.items())).encode()).hexdigest()
        self.commits[digest] = whole
        self.branches[branch] = digest
        return digest

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag or a hash names."""
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


class RefusalError(Exception):
    """An error that the Hub answers, with its code."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class FakeHub(ThreadingHTTPServer):
    """The server; `url` is its HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()
        self.thread.join(5)

    def add(
        self, name: str, files: dict[str, bytes], kind: str = "models", **flags: bool
    ) -> Repository:
        """Make a repository with a first commit on main."""
        repository = self.repositories[kind, name] = Repository(**flags)
        repository.commit("main", files)
        return repository

    def model(self, name: str) -> Repository:
        """Return a model's repository."""
        return self.repositories["models", name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a model's repository has at a revision."""
        repository = self.model(name)
        commit = repository.find(revision)
        assert commit is not None
        return repository.commits[commit]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self.answer()

    def do_HEAD(self) -> None:
        """Answer a HEAD."""
        self.answer()

    def do_POST(self) -> None:
        """Answer a POST."""
        self.answer()

    def do_PUT(self) -> None:
        """Answer a PUT."""
        self.answer()

    def answer(self) -> None:
        """Route a request, and send what comes of it, errors as the Hub sends them."""
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.body = self.read_body()
        self.server.requests.append(f"{self.command} {self.path}")
        try:
            self.route()
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send(refusal.status, {"error": refusal.message}, headers)

    def read_body(self) -> bytes:
        """Return what was sent, as a whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self) -> None:
        """Find out what is asked."""
        if self.user is None and self.headers.get("Authorization"):
            raise RefusalError(401, None, "Invalid credentials in Authorization header")
        if self.path == "/api/repos/create":
            return self.create()
        if self.path == "/api/validate-yaml":
            return self.validate()
        if self.path.startswith("/lfs/"):
            self.server.objects[self.path.removeprefix("/lfs/")] = self.body
            return self.send(200, {})
        if match := _LFS.fullmatch(self.path):
            return self.lfs_batch()
        if match := _RESOLVE.fullmatch(self.path):
            kind = match["kind"] or "models/"
            return self.resolve(kind[:-1], match["repo"], match["revision"], match["path"])
        if match := _API.fullmatch(self.path):
            return self.api(match["kind"], match["repo"], match["rest"] or "")
        raise RefusalError(404, None, f"the fake Hub knows no {self.path}")

    @property
    def user(self) -> str | None:
        """Return whose token was sent."""
        return USERS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def find(self, kind: str, name: str) -> Repository:
        """Return a repository that the user may see."""
        repository = self.server.repositories.get((kind, name))
        if repository is None or (repository.private and self.user != name.split("/")[0]):
            # Without a token the Hub does not tell what is missing from what is private.
            raise RefusalError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repository

    def at(self, repository: Repository, revision: str) -> str:
        """Return the commit of a revision."""
        commit = repository.find(unquote(revision))
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return commit

    def may_read(self, repository: Repository, name: str) -> None:
        """Refuse the files of a gated repository."""
        if repository.gated and self.user != name.split("/")[0]:
            raise RefusalError(
                403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted"
            )

    def may_write(self, namespace: str) -> None:
        """Refuse who is not the owner, or has a token to read only."""
        if self.user is None:
            raise RefusalError(401, None, "Invalid username or password.")
        read_only = (self.headers.get("Authorization") or "").endswith(READ_TOKEN)
        if self.user != namespace or read_only:
            raise RefusalError(403, None, "You don't have the rights to create a model here")

    def create(self) -> None:
        """Make a repository."""
        asked = json.loads(self.body)
        kind = {"dataset": "datasets"}.get(asked.get("type", "model"), "models")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        self.may_write(name.split("/")[0])
        if (kind, name) in self.server.repositories:
            raise RefusalError(409, None, "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = self.server.add(name, {".gitattributes": b""}, kind)
        repository.private = private
        self.send(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate(self) -> None:
        """Check a card's metadata: YAML, and a base model that is a name of the Hub."""
        content = json.loads(self.body)["content"]
        front = content.split("---")[1] if content.startswith("---") else ""
        errors = []
        try:
            values = yaml.safe_load(front) or {}
        except yaml.YAMLError as error:
            values, errors = {}, [{"message": str(error)}]
        base = values.get("base_model")
        if base and not re.fullmatch(r"[\w.\-]+/[\w.\-]+", str(base)):
            errors.append({"message": f'"base_model" with value "{base}" is not valid'})
        for model in values.get("model-index") or []:
            for result in model["results"]:
                needed = (result["task"]["type"], result["dataset"]["type"], result["metrics"])
                if not all(needed) or not isinstance(result["metrics"][0]["value"], int | float):
                    errors.append({"message": f"model-index: {result}"})
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def lfs_batch(self) -> None:
        """Say where to upload large files."""
        objects = [
            entry
            | {
                "actions": {
                    "upload": {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}
                }
            }
            for entry in json.loads(self.body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        """Send a file, or its facts."""
        repository = self.find(kind, name)
        commit = self.at(repository, revision)
        self.may_read(repository, name)
        content = repository.commits[commit].get(unquote(path))
        if content is None:
            headers = {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"}
            return self.send(404, {"error": "Entry not found"}, headers)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{blob_id(content)}"',
            "Accept-Ranges": "bytes",
        }
        if re.fullmatch(r"bytes=(\d+)-(\d*)", wanted := self.headers.get("Range") or ""):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            return self.send(206, content[int(first) : end], headers)
        return self.send(200, content, headers)

    def api(self, kind: str, name: str, rest: str) -> None:
        """Answer about a repository, or change it."""
        verb, _, argument = rest.strip("/").partition("/")
        repository = self.find(kind, name)
        if verb in ("preupload", "commit", "branch", "tag"):
            self.may_write(name.split("/")[0])
        if verb in ("", "revision"):
            self.send(200, self.about(repository, name, self.at(repository, argument or "main")))
        elif verb == "refs":
            listed = {"branches": repository.branches, "tags": repository.tags}
            found = {
                key: [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
                    for n, c in refs.items()
                ]
                for key, refs in listed.items()
            }
            self.send(200, found | {"converts": []})
        elif verb == "tree":
            revision, _, folder = argument.partition("/")
            commit = self.at(repository, revision)
            self.send(
                200, tree(repository.commits[commit], unquote(folder), "recursive" in self.query)
            )
        elif verb == "paths-info":
            files = repository.commits[self.at(repository, argument)]
            asked = [value.strip("/") for value in self.paths_asked()]
            everything = {entry["path"]: entry for entry in tree(files, "", True)}
            self.send(200, [everything[path] for path in asked if path in everything])
        elif verb == "preupload":
            self.at(repository, argument)
            self.send(200, {"files": [mode_of(file) for file in json.loads(self.body)["files"]]})
        elif verb == "commit":
            self.commit(repository, name, unquote(argument))
        elif verb == "branch":
            if unquote(argument) in repository.branches:
                raise RefusalError(409, None, "Reference already exists")
            start = json.loads(self.body or b"{}").get("startingPoint") or "main"
            repository.branches[unquote(argument)] = self.at(repository, start)
            self.send(200, {})
        elif verb == "tag":
            repository.tags[json.loads(self.body)["tag"]] = self.at(repository, argument)
            self.send(200, {})
        else:
            raise RefusalError(404, "EntryNotFound", f"the fake Hub knows no {self.path}")

    def paths_asked(self) -> list[str]:
        """Return the paths of a form or of JSON."""
        if "json" in (self.headers.get("Content-Type") or ""):
            return list(json.loads(self.body)["paths"])
        return parse_qs(self.body.decode()).get("paths", [])

    def commit(self, repository: Repository, name: str, branch: str) -> None:
        """Take a commit: lines of JSON."""
        self.at(repository, branch)
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        digest = repository.commit(branch, files)
        url = f"{self.server.url}/{name}/commit/{digest}"
        self.send(200, {"success": True, "commitOid": digest, "commitUrl": url})

    def about(self, repository: Repository, name: str, commit: str) -> dict[str, Any]:
        """Return a repository's facts."""
        return {
            "id": name,
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "author": name.split("/")[0],
            "siblings": [
                {"rfilename": path, "size": len(content)}
                for path, content in sorted(repository.commits[commit].items())
            ],
        }

    def send(
        self, status: int, content: bytes | Any, headers: dict[str, str] | None = None
    ) -> None:
        """Send bytes, or JSON."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for key, value in (
            {"Content-Type": kind, "Content-Length": str(len(raw))} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def blob_id(content: bytes) -> str:
    """Return git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def mode_of(file: dict[str, Any]) -> dict[str, Any]:
    """Return how a file is to be uploaded."""
    large = file["path"].endswith(LFS_ENDINGS)
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries of a folder, or of it and all below."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            name = prefix + "/".join(parts[:depth])
            found.setdefault(name, {"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
        found[path] = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
    if found or not folder:
        below = len(prefix.split("/"))
        return [e for e in found.values() if recursive or len(e["path"].split("/")) == below]
    raise RefusalError(404, "EntryNotFound", f"{folder} does not exist")
