# SPDX-License-Identifier: Apache-2.0
"""A hub for tests: the few endpoints behind `push_to_hub` and `from_pretrained`, in memory, on this machine only."""

import base64
import hashlib
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlparse


class HubServer(ThreadingHTTPServer):
    """Runs in a thread inside a `with` block; `repositories[name][file]` is what was pushed, as bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: Counter[str] = Counter()  # by repository
        self.requests: dict[str, dict] = {}  # what was asked for when a repository was made
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        path, body = urlparse(self.path).path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        files = self.server.repositories
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'tester'}/{request['name']}"
            files.setdefault(name, {})
            self.server.requests.setdefault(name, request)
            self._json({"url": f"{self.server.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            # "regular": even weights travel inside the commit
            asked = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._json({"files": [{**file, "shouldIgnore": False} for file in asked]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", path):
            repository = files[found[1]]
            self.server.commits[found[1]] += 1
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del repository[line["value"]["path"]]
            oid = self._commit(repository)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{found[1]}/commit/{oid}"})
        else:
            self._error(404, "RepoNotFound")

    def do_GET(self):
        path, files = unquote(urlparse(self.path).path), self.server.repositories
        if path == "/api/whoami-v2":
            return self._json({"name": "tester", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if (found := re.fullmatch(r"/api/models/(.+?)(/revision/[^/]+)?", path)) and found[1] in files:
            names = [{"rfilename": name} for name in files[found[1]]]
            return self._json({"id": found[1], "sha": self._commit(files[found[1]]), "siblings": names, "tags": []})
        if (found := re.fullmatch(r"/api/models/(.+)/tree/[^/]+(/.+)?", path)) and found[1] in files:
            return self._tree(files[found[1]], (found[2] or "").removeprefix("/"))
        if not (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) or found[1] not in files:
            return self._error(404, "RepoNotFound")
        if found[2] not in files[found[1]]:
            return self._error(404, "EntryNotFound", **{"X-Repo-Commit": self._commit(files[found[1]])})
        content = files[found[1]][found[2]]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._send(200, content, **{"ETag": etag, "X-Repo-Commit": self._commit(files[found[1]])})

    do_HEAD = do_GET

    def _tree(self, repository: dict[str, bytes], folder: str) -> None:
        """All files below a folder, which is what is asked for."""
        below = {name: data for name, data in repository.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not below:
            return self._error(404, "EntryNotFound")
        oids = {name: hashlib.sha1(data).hexdigest() for name, data in below.items()}
        self._json([{"type": "file", "path": n, "size": len(d), "oid": oids[n]} for n, d in below.items()])

    def _commit(self, repository: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted(repository.items())).encode()).hexdigest()

    def _json(self, answer: dict) -> None:
        self._send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def _error(self, status: int, code: str, **headers: str) -> None:
        self._send(status, b"", **{"X-Error-Code": code, **headers})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass
