"""A server on this machine that takes uploads as the Hugging Face Hub does."""

import base64
import contextlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Dict, Iterator


class LocalHub:
    """What was uploaded: `repositories[name]` has each file's content, `created[name]` the request that made it."""

    def __init__(self):
        self.repositories: Dict[str, Dict[str, bytes]] = {}
        self.created: Dict[str, dict] = {}
        self.refuses = False
        self.address = ""


def _handler(hub: LocalHub) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if hub.refuses:
                return self._answer(403, {"error": "You may not write here."})
            if self.path == "/api/repos/create":
                request = json.loads(body)
                name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
                hub.created[name] = request
                hub.repositories.setdefault(name, {})
                return self._answer(200, {"url": f"{hub.address}/{name}", "id": name, "name": name})
            if self.path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            match = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/main.*", self.path)
            if match and match.group(2) == "preupload":
                files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
                return self._answer(200, {"files": files})
            if match:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[match.group(1)][line["value"]["path"]] = content
                return self._answer(200, {"commitUrl": f"{hub.address}/{match.group(1)}/commit/1", "commitOid": "1"})
            return self._answer(404, {"error": "not found"})

        def do_GET(self):
            match = re.fullmatch(r"/api/models/(.+?)(/.*)?", self.path)
            found = match and match.group(1) in hub.repositories
            self._answer(200 if found else 404, {"id": match.group(1), "siblings": []} if found else {"error": "not found"})

        def _answer(self, status: int, content: dict) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments) -> None:
            pass

    return Handler


@contextlib.contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
