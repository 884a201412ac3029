"""A hub on this machine: the parts of its interface that a download uses, and their failures."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and how it fails."""

    files: dict[str, bytes] = field(default_factory=dict)
    repo: str = "org/tiny-GGUF"
    commit: str = COMMIT
    url: str = ""
    stated: dict[str, str] = field(default_factory=dict)
    """SHA-256 to state in place of a file's own."""
    cut: int | None = None
    """Close a file's connection after so many bytes, and answer no request for the rest."""
    status: int | None = None
    error: str | None = None
    """Answer everything with this status, and this X-Error-Code."""
    garbage: bool = False
    siblings: object = None
    """What to list in place of the files."""
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""

    def sha256(self, file: str) -> str:
        return self.stated.get(file) or hashlib.sha256(self.files[file]).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((self.command, path, self.headers.get("Range")))
            if hub.status is not None:
                self.answer(hub.status, b"{}", {"X-Error-Code": hub.error or "Other"})
            elif hub.garbage:
                self.answer(200, b"<html>a portal of some hotel</html>", {})
            elif path in (f"/api/models/{hub.repo}/revision/main", f"/api/models/{hub.repo}"):
                self.answer(200, json.dumps(self.listing()).encode(), {})
            elif path.startswith(f"/{hub.repo}/resolve/main/"):
                self.file(path.removeprefix(f"/{hub.repo}/resolve/main/"))
            else:
                code = "RevisionNotFound" if hub.repo in path else "RepoNotFound"
                self.answer(404, b"{}", {"X-Error-Code": code})

        def listing(self) -> dict[str, object]:
            def lfs(name: str, content: bytes) -> dict[str, object]:
                return {"sha256": hub.sha256(name), "size": len(content), "pointerSize": 134}

            files: object = [
                {"rfilename": name, "size": len(content), "lfs": lfs(name, content)}
                for name, content in hub.files.items()
            ]
            if hub.siblings is not None:
                files = hub.siblings
            return {"id": hub.repo, "sha": hub.commit, "siblings": files}

        def file(self, name: str) -> None:
            if name not in hub.files:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            content, start = hub.files[name], 0
            if asked := self.headers.get("Range"):
                if hub.cut is not None:
                    self.answer(503, b"", {})
                    return
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers = {
                "X-Repo-Commit": hub.commit,
                "ETag": f'"{hub.sha256(name)}"',
                "Accept-Ranges": "bytes",
            }
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206 if start else 200, content[start:], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                # What is whole stays open: the client might just be asking on it again.
                whole = hub.cut is None or "/resolve/" not in self.path or not body
                self.wfile.write(body if whole else body[: hub.cut])
                self.close_connection = not whole

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
