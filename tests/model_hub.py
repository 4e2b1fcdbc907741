"""A small local stand-in for the Hugging Face Hub: model repositories that are made, written and read over its HTTP."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_TOKEN = "hf_secretofsomebody", "hf_readsonly"
USER = "somebody"


class ModelHub:
    """Repositories in memory: `files[repo][revision]` holds contents by path. One user, two tokens.

    `trouble(method, path)` may return a status code to answer with, or "hang" for no answer at all.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.trouble: Callable[[str, str], int | str | None] = lambda method, path: None
        self.endpoint = ""
        self.closing = threading.Event()

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        """A public repository that is there already."""
        self.files[repo], self.private[repo] = {"main": files}, False

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of a process that uses this Hub and nothing of the user's own; an empty string for what must not be set."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": token or "", "HF_HUB_DISABLE_XET": "1"}
        return names | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def wait_for_commits(self, number: int, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while len(self.commits) < number:
            assert time.monotonic() < end, f"{self.commits}, {self.requests[-20:]}"
            time.sleep(0.01)

    def sha(self, repo: str, revision: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repo][self.branch(repo, revision)].items())).encode()).hexdigest()

    def branch(self, repo: str, revision: str) -> str:
        branches = self.files[repo]
        return revision if revision in branches else next(b for b in branches if self.sha(repo, b) == revision)

    # -----------------------------------------------------------------------------------------------------------------
    # One method per request; each returns a status and a JSON object.

    def whoami(self, token: str) -> tuple[int, Any]:
        role = {TOKEN: "write", READ_TOKEN: "read"}.get(token)
        if role is None:
            return 401, {"error": "Invalid credentials in Authorization header"}
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return 200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth}

    def create(self, token: str, body: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{body.get('organization') or USER}/{body['name']}"
        if repo in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{repo}"}
        if token != TOKEN or not repo.startswith(f"{USER}/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.files[repo] = {"main": {}}
        self.private[repo] = body.get("visibility") == "private" or body.get("private") is True
        return 200, {"url": f"{self.endpoint}/{repo}"}

    def commit(self, token: str, repo: str, revision: str, body: bytes, create_pr: bool) -> tuple[int, Any]:
        if token != TOKEN or not (create_pr or repo.startswith(f"{USER}/")):
            return 403, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"}
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        target = f"refs/pr/{len(self.files[repo])}" if create_pr else revision
        self.files[repo][target] = self.files[repo][revision] | added
        header = lines[0]["value"]
        record = {"repo": repo, "revision": target, "files": sorted(added), "message": header["summary"]}
        self.commits.append(record | {"token": token})
        sha = self.sha(repo, target)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}"}
        return 200, answer | {"pullRequestUrl": f"{self.endpoint}/{repo}/discussions/1"}

    def info(self, repo: str, revision: str) -> tuple[int, Any]:
        names = self.files[repo][self.branch(repo, revision)]
        answer = {"id": repo, "sha": self.sha(repo, revision), "siblings": [{"rfilename": name} for name in names]}
        return 200, answer | {"private": self.private[repo], "tags": [], "downloads": 0, "likes": 0, "gated": False}

    def tree(self, repo: str, revision: str) -> tuple[int, Any]:
        files = self.files[repo][self.branch(repo, revision)]
        entries = [{"type": "file", "path": n, "size": len(c), "oid": blob_id(c)} for n, c in files.items()]
        return 200, entries

    def preupload(self, repo: str, revision: str, body: dict[str, Any]) -> tuple[int, Any]:
        have = self.files[repo][revision]
        answers = []
        for file in body["files"]:
            known = blob_id(have[file["path"]]) if file["path"] in have else None
            answers.append({"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": known})
        return 200, {"files": answers}


def blob_id(content: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def model_hub() -> Iterator[ModelHub]:
    """A Hub that answers until the block ends."""
    hub = ModelHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def json(self, status: int, content: Any, **headers: str) -> None:
            if status >= 400 and isinstance(content, dict) and "error" in content:
                headers.setdefault("X_Error_Message", content["error"])
            self.answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

        def handle_request(self) -> None:
            url = urlsplit(self.path)
            path, query = url.path, parse_qs(url.query)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {path}")
            trouble = hub.trouble(self.command, path)
            if trouble == "hang":
                hub.closing.wait(60)
                self.close_connection = True
                return None
            if isinstance(trouble, int):
                return self.json(trouble, {"error": f"trouble {trouble}"})
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if path == "/api/whoami-v2":
                return self.json(*hub.whoami(token))
            if path == "/api/repos/create":
                return self.json(*hub.create(token, json.loads(body)))
            if path == "/api/validate-yaml":
                return self.json(200, {"errors": [], "warnings": []})
            parts = [unquote(part) for part in path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                return self.repository("/".join(parts[2:4]), parts[4:], token, body, "create_pr" in query)
            return self.resolve("/".join(parts[:2]), parts[2:])

        def repository(self, repo: str, rest: list[str], token: str, body: bytes, create_pr: bool) -> None:
            if repo not in hub.files:
                return self.json(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            what, revision = (rest + ["", "main"][len(rest) :])[:2] if rest else ("revision", "main")
            if what != "branch" and not self.exists(repo, revision):
                return self.json(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            if what == "revision":
                return self.json(*hub.info(repo, revision))
            if what == "tree":
                return self.json(*hub.tree(repo, revision))
            if what == "preupload":
                return self.json(*hub.preupload(repo, revision, json.loads(body)))
            if what == "commit":
                return self.json(*hub.commit(token, repo, revision, body, create_pr))
            if what == "branch":
                status = 409 if revision in hub.files[repo] else 200
                hub.files[repo].setdefault(revision, dict(hub.files[repo]["main"]))
                return self.json(status, {"error": "Reference already exists"} if status == 409 else {})
            hub.unknown.append(f"{self.command} {self.path}")
            return self.json(404, {"error": "not in this stand-in"})

        def exists(self, repo: str, revision: str) -> bool:
            return revision in hub.files[repo] or any(hub.sha(repo, b) == revision for b in hub.files[repo])

        def resolve(self, repo: str, rest: list[str]) -> None:
            if repo not in hub.files or rest[:1] != ["resolve"]:
                return self.json(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            revision, name = rest[1], "/".join(rest[2:])
            if not self.exists(repo, revision):
                return self.json(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            files = hub.files[repo][hub.branch(repo, revision)]
            if name not in files:
                headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": hub.sha(repo, revision)}
                return self.json(404, {"error": "Entry not found"}, **headers)
            headers = {"ETag": f'"{blob_id(files[name])}"', "X_Repo_Commit": hub.sha(repo, revision)}
            return self.answer(200, files[name], Content_Type="application/octet-stream", **headers)

        do_GET = do_HEAD = do_POST = handle_request

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
