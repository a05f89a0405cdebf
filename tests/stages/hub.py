"""A Hugging Face hub on this machine, as far as uploading a folder goes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_this_test"


class Hub:
    """What arrived: repositories with their files and commit messages.

    Attributes:
        files: repository -> path -> content.
        asked: (method, path) of every request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.asked.append((method, path))
        parts = path.partition("?")[0].strip("/").split("/")
        if method == "PUT":
            self.objects[parts[-1]] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            if name in self.files:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}
            private = asked.get("private") or asked.get("visibility") == "private"
            self.files[name], self.private[name] = {}, bool(private)
            return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}
        if parts[:2] == ["api", "models"]:
            name, what = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
            if what == "preupload":
                files = json.loads(body)["files"]
                large = {f["path"]: f["path"].endswith(".safetensors") for f in files}
                modes = {path: "lfs" if large[path] else "regular" for path in large}
                told = [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                    for path, mode in modes.items()
                ]
                return 200, {"files": told, "commitOid": "0" * 40}
            if what == "commit":
                for line in map(json.loads, body.splitlines()):
                    self._take(name, line["key"], line["value"])
                return 200, {
                    "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40,
                    "success": True,
                }  # fmt: skip
            siblings = [{"rfilename": path} for path in self.files.get(name, {})]
            return 200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings,
                         "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        if parts[-2:] == ["objects", "batch"]:
            wanted = json.loads(body)["objects"]
            made = [
                item
                | {"actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}}}
                for item in wanted
            ]
            return 200, {"transfer": "basic", "objects": made}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        return 404, {"error": f"not known here: {method} {path}"}

    def _take(self, name: str, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.messages.append(value["summary"])
        elif key == "file":
            self.files[name][value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            content = self.objects[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            self.files[name][value["path"]] = content


@contextmanager
def running() -> Iterator[Hub]:
    """The hub, served until the end."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            public = self.command == "PUT"  # signed by its address
            if not public and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, content = 401, {"error": "Invalid username or password."}
            else:
                status, content = hub.answer(self.command, self.path, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
