"""A hub on this machine that takes uploads: what `huggingface_hub` asks of it, and no more."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


class HubServer:
    """Listens until closed. `files` holds what was committed, by repository and path; `fails` makes
    a kind of request (its path's part) fail."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.fails = ""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, dict]:
        """Status and content for a request."""
        if self.fails and self.fails in path:
            return 403, {"error": "no more room"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "orgs": [{"name": "a-lab"}]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.files.setdefault(repo, {})
            return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        repo, kind = path.removeprefix("/api/models/").rsplit("/main", 1)[0].rsplit("/", 1)
        if kind == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                ]
            }
        assert kind == "commit", path
        self.commits.append(repo)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
        sha = "0" * 40
        return 200, {"commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body, token = self.rfile.read(size), self.headers.get("Authorization", "")
                status, content = hub.answer(self.path.split("?")[0], token, body)
                sent = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_POST = _reply

            def log_message(self, *args) -> None:
                pass

        return Handler
