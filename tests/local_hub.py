"""A server on this machine that takes uploads and gives downloads as the Hugging Face Hub does."""

import atexit
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote


with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    PORT = _free.getsockname()[1]

ADDRESS = f"http://127.0.0.1:{PORT}"

# The Hub's client reads these when it is imported: the tests, and what they start, reach neither the real Hub nor the user's cache.
_CACHE = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    {
        "HF_HOME": _CACHE,
        "HF_ENDPOINT": ADDRESS,
        "HF_TOKEN": "hf_token",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
)


class LocalHub:
    """What the server holds and was asked; it listens at `ADDRESS`.

    Attributes:
        repositories: each one's branches, and each branch's files: `repositories[name]["main"]["config.json"]`.
        heads: the hash of each branch's last commit.
        created: for each repository, the request that made it.
        commits: what was said of each commit: repository, branch, summary.
        requests: method, path and Range of every request.
        refuses: whether uploads are refused.
        cuts: files whose next download breaks off after so many bytes.
        stalls: files whose next download stops for good after so many bytes, with the connection open.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = defaultdict(lambda: {"main": {}})
        self.heads: dict[tuple[str, str], str] = defaultdict(lambda: secrets.token_hex(20))
        self.created: dict[str, dict] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.refuses = False
        self.cuts: dict[str, int] = {}
        self.stalls: dict[str, int] = {}

    def add(self, name: str, folder: Path, branch: str = "main") -> None:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.repositories[name][branch] = files

    def downloads(self) -> list[str]:
        """Files that were asked for, in order."""
        return [path.split("/", 5)[5] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def revision(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit and the files that a branch's name or a commit's hash stands for; a KeyError if there is none."""
        for branch, files in self.repositories[name].items() if name in self.repositories else ():
            commit = self.heads[name, branch]
            if revision in (branch, commit):
                return commit, files
        raise KeyError(revision)


def _handler(hub: LocalHub) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self._note()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if hub.refuses:
                return self._answer(403, {"error": "You may not write here."})
            path, _, query = self.path.partition("?")
            if path == "/api/repos/create":
                request = json.loads(body)
                name = f"{request.get('organization') or 'somebody'}/{request['name']}"
                hub.created.setdefault(name, request)
                hub.repositories[name]
                return self._answer(200, {"url": f"{ADDRESS}/{name}", "id": name, "name": name})
            if path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
            if not match:
                return self._answer(404, {"error": "not found"})
            name, action, branch = match.group(1), match.group(2), unquote(match.group(3))
            if action == "branch":
                hub.repositories[name].setdefault(branch, dict(hub.repositories[name]["main"]))
                return self._answer(200, {})
            if action == "preupload":
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                return self._answer(200, {"files": files})
            files = dict(hub.repositories[name][branch])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.commits.append((name, branch, line["value"]["summary"]))
                if line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{ADDRESS}/{name}/commit/1", "commitOid": "1"}
            if "create_pr" in query:
                answer["pullRequestUrl"] = f"{ADDRESS}/{name}/discussions/1"
            else:
                hub.repositories[name][branch] = files
                hub.heads.pop((name, branch), None)
            return self._answer(200, answer)

        def do_GET(self):
            self._note()
            path = unquote(self.path.partition("?")[0])
            try:
                if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    commit, files = hub.revision(match.group(1), match.group(2))
                    return self._send_file(commit, match.group(3), files[match.group(3)])
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                    commit, files = hub.revision(match.group(1), match.group(2) or "main")
                    siblings = [{"rfilename": name} for name in sorted(files)]
                    return self._answer(200, {"id": match.group(1), "sha": commit, "siblings": siblings})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
                    _, files = hub.revision(match.group(1), match.group(2))
                    entries = [
                        {"type": "file", "path": name, "size": len(files[name]), "oid": _etag(files[name])}
                        for name in sorted(files)
                    ]
                    return self._answer(200, entries)
            except KeyError:
                code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
                return self._answer(404, {"error": "not found"}, {"X-Error-Code": code})
            self._answer(404, {"error": "not found"})

        do_HEAD = do_GET

        def _send_file(self, commit: str, name: str, content: bytes) -> None:
            start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-")).group(1))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{_etag(content)}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in hub.cuts:
                self.wfile.write(content[start : start + hub.cuts.pop(name)])
                self.close_connection = True
                return
            if name in hub.stalls:
                self.wfile.write(content[start : start + hub.stalls.pop(name)])
                self.wfile.flush()
                time.sleep(60)
                return
            self.wfile.write(content[start:])

        def _answer(self, status: int, content, headers: dict[str, str] = {}) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _note(self) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))

        def log_message(self, *arguments) -> None:
            pass

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", PORT), _handler(hub))
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
