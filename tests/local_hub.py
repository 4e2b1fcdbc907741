"""A small local stand-in for the Hugging Face Hub: serves one data set repository over its HTTP protocol."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def dataset_hub(repo: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Yield the endpoint of a Hub that holds `repo` with `files`, and the list of requests that it gets."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def entries(self) -> list[dict]:
            return [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]

        def children(self, folder: str) -> list[dict]:
            """Files and folders directly in `folder`, "" for the top."""
            prefix = f"{folder}/" if folder else ""
            below = [entry for entry in self.entries() if entry["path"].startswith(prefix)]
            inner = {e["path"].removeprefix(prefix).partition("/")[0] for e in below if "/" in e["path"][len(prefix) :]}
            folders = [{"type": "directory", "path": f"{prefix}{name}", "oid": SHA, "size": 0} for name in inner]
            return folders + [entry for entry in below if "/" not in entry["path"][len(prefix) :]]

        def handle_request(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            api, resolve = f"/api/datasets/{repo}", f"/datasets/{repo}/resolve/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
                info = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files], "tags": []}
                info |= {"private": False, "downloads": 0, "likes": 0, "gated": False, "disabled": False}
                self.answer(json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"{api}/tree/"):
                below = path.removeprefix(f"{api}/tree/").partition("/")[2]
                self.answer(json.dumps(self.children(below)).encode(), Content_Type="application/json")
            elif path.startswith(f"{api}/paths-info/"):
                asked = json.loads(body)["paths"] if body.startswith(b"{") else []
                found = [entry for entry in self.entries() if entry["path"] in asked]
                self.answer(json.dumps(found).encode(), Content_Type="application/json")
            elif path.startswith(resolve) and (name := path.removeprefix(resolve).partition("/")[2]) in files:
                content = files[name]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(content, ETag=etag, X_Repo_Commit=SHA, Content_Type="application/octet-stream")
            else:
                known = path.startswith((api, resolve, f"/datasets/{repo}"))
                self.answer(b"{}", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")

        do_GET = do_HEAD = do_POST = handle_request

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
