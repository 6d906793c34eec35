"""A small server on the loopback that speaks the part of the hub's API that `huggingface_hub` uses.

Reading: `/api/models/ID[/revision/REV]`, `/tree/REV`, `/paths-info/REV`, and `/ID/resolve/REV/FILE` with its
ETag, commit, size and byte ranges. Writing: creation, preupload, LFS batch, upload and verification, commits
as lines of JSON (https://huggingface.co/docs/hub/api, and Git LFS's `docs/api/batch.md`). Repositories are
commits of files in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

__all__ = ["HubServer", "Repository"]

_IDS = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass
class Repository:
    """One model repository: files by commit, and commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Makes a commit of exactly these files, and its name."""
        text = "".join(f"{n} {hashlib.sha256(c).hexdigest()}" for n, c in sorted(files.items()))
        name = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the main branch."""
        return self.commits[self.refs["main"]]


class HubServer:
    """The server, a context manager; `repositories` may be changed while it runs.

    Attributes:
        repositories: by `org/name`.
        tokens: the rights of each token: `read` or `write`.
        asked: paths of all requests so far, with their methods, such as `GET /api/whoami-v2`.
        broken_uploads: how many uploads of large files break off before one succeeds.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_write": "write", "hf_read": "read"}
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.broken_uploads = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, folder: Path, ref: str = "main") -> str:
        """Puts a folder's files into a repository, and returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, ref)

    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        pattern = r"GET (?:/datasets)?/[^/]+/[^/]+/resolve/[^/]+/(.+)"
        found = (re.fullmatch(pattern, line) for line in self.asked)
        return sorted(match[1] for match in found if match)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def card_errors(content: str) -> list[str]:
    """What the hub refuses of a card's front matter: among other things, base models that are not ids."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    found = yaml.safe_load(match[1]) if match else {}
    bases = found.get("base_model", [])
    errors = [
        f'"base_model[{i}]" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for i, base in enumerate([bases] if isinstance(bases, str) else bases)
        if not _IDS.fullmatch(base) or base.startswith(".")
    ]
    if not re.fullmatch(r"[a-z0-9.-]+", str(found.get("license", "mit"))):
        errors.append('"license" must be one of the known licenses')
    if found.get("license") == "other" and "license_name" not in found:
        errors.append('"license_name" is needed beside "license: other"')
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/(?:models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", self._paths),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(\w+)", self._upload),
            (r"/verify", lambda body: self._json({})),
            (r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                answer(*match.groups(), body)
                return
        self._json({"error": "not found"}, 404)

    def _send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def _rights(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _writes(self) -> bool:
        if self._rights() == "write":
            return True
        self._refuse(403, "", "you need a token with write access")
        return False

    def _files(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None where a refusal was sent."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._rights() is None):
            self._refuse(401 if self._rights() is None else 404, "RepoNotFound", "Repository not found")
            return None
        if found.gated and self._rights() is None:
            self._refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
            return None
        commit = found.refs.get(revision or "main", revision or "")
        if commit not in found.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, found.commits[commit]

    def _whoami(self, body: bytes) -> None:
        if (rights := self._rights()) is None:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        else:
            token = {"accessToken": {"displayName": "t", "role": rights}}
            self._json({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token", **token}})

    def _validate(self, body: bytes) -> None:
        errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, body: bytes) -> None:
        if not self._writes():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = name in self.hub.repositories
        private = bool(asked.get("private")) or asked.get("visibility") == "private"  # clients differ
        if not exists:
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({})
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        self._json({"error": "You already created this model repo", **answer} if exists else answer,
                   409 if exists else 200)  # fmt: skip

    def _info(self, name: str, revision: str | None, body: bytes) -> None:
        if (found := self._files(name, revision)) is not None:
            siblings = [{"rfilename": file} for file in found[1]]
            self._json({"id": name, "modelId": name, "sha": found[0], "private": False, "tags": [],
                        "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
        if len(content) > 1000:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content),
                            "pointerSize": 130}  # fmt: skip
        return entry

    def _tree(self, name: str, revision: str, folder: str | None, body: bytes) -> None:
        if (found := self._files(name, revision)) is None:
            return
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in found[1].items() if path.startswith(prefix)}
        entries = [self._entry(path, content) for path, content in inside.items()]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            folders = {prefix + p[len(prefix) :].split("/")[0] for p in inside if "/" in p[len(prefix) :]}
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
            entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        self._json(entries)

    def _paths(self, name: str, revision: str, body: bytes) -> None:
        if (found := self._files(name, revision)) is None:
            return
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        entries = [self._entry(path, found[1][path]) for path in asked if path in found[1]]
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in asked
                    if any(file.startswith(f"{path}/") for file in found[1])]  # fmt: skip
        self._json(entries)

    def _resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        if (found := self._files(name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit,
                   "X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}  # fmt: skip
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            start, stop = int(part[1]), int(part[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            content = content[start:stop]
        self._send(content, 206 if part else 200, headers)

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        if not self._writes() or (found := self._files(name, revision)) is None:
            return
        answers = [
            {"path": file["path"], "shouldIgnore": False, "oid": self._remote_oid(found[1].get(file["path"])),
             "uploadMode": "lfs" if file["size"] > 1000 else "regular"}
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        self._json({"files": answers})

    @staticmethod
    def _remote_oid(content: bytes | None) -> str | None:
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if len(content) > 1000 else _blob(content)

    def _batch(self, name: str, body: bytes) -> None:
        if not self._writes():
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}},
                                  "verify": {"href": f"{self.hub.url}/verify", "header": {}}}  # fmt: skip
            objects.append(one)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        if self.hub.broken_uploads:
            self.hub.broken_uploads -= 1
            self._refuse(403, "", "the storage is out of order")
        else:
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.blobs[oid] = body
            self._json({})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        if not self._writes() or (found := self._files(name, revision)) is None:
            return
        files = dict(found[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.repositories[name].commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _blob(content: bytes) -> str:
    """The name git gives a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
