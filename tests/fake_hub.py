"""A server on this machine that answers huggingface_hub as the Hub does, for one repository in a local folder."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REPOSITORY = "org/model"
COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class FakeHub:
    """`with FakeHub(folder) as hub`: `hub.url` to ask, `hub.downloaded` the files that were asked for."""

    def __init__(self, folder: Path):
        self.folder, self.downloaded = folder, set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.wfile.write(self.answer())

            def answer(self) -> bytes:
                path = urlsplit(self.path).path
                if path.startswith(f"/api/models/{REPOSITORY}"):
                    return self.send(200, json.dumps(hub.listing(tree="/tree/" in path)).encode())
                revision, _, name = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")
                file = hub.folder / name
                if revision not in ("main", COMMIT) or not file.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.end_headers()
                    return b""
                if self.command == "GET":
                    hub.downloaded.add(name)
                return self.send(200, file.read_bytes())

            def send(self, status: int, body: bytes) -> bytes:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                return body

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def listing(self, tree: bool) -> dict | list:
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        names = [file.relative_to(self.folder).as_posix() for file in files]
        if tree:
            sizes = [file.stat().st_size for file in files]
            return [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in zip(names, sizes, strict=True)]
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
