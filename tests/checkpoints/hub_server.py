"""A local server that speaks the hub's protocol for the files of a folder."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What is larger is kept outside of Git, as weights are.
LARGE = 20_000


class Hub:
    """One repository, `owner/name`, with what may go wrong.

    Attributes:
      address: of the server.
      folder: the files, at revisions `main`, `v1` and the commit.
      requests: method, path and Range of each, in their order.
      cut: names of files whose next answer ends after half of the bytes, once each.
      wrong: names of files that come with another content than their hash says.
      refusal: a status and a code that every request gets.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: set[str] = set()
        self.wrong: set[str] = set()
        self.refusal: tuple[int, str] | None = None
        self.address = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        marks = (path for method, path, _ in self.requests if method == "GET")
        return [
            path.split("/resolve/")[1].split("/", 1)[1] for path in marks if "/resolve/" in path
        ]

    def ranges(self, name: str) -> list[str | None]:
        """The Range of each request for the content of a file."""
        return [r for m, path, r in self.requests if m == "GET" and path.endswith(f"/{name}")]

    def names(self) -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def listing(self) -> dict:
        siblings = []
        for name in self.names():
            data = (self.folder / name).read_bytes()
            one = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if len(data) > LARGE:
                digest = hashlib.sha256(data).hexdigest()
                one["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(one)
        fixed = {"private": False, "downloads": 0, "likes": 0, "tags": [], "_id": "0"}
        return {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT} | fixed | {
            "siblings": siblings
        }  # fmt: skip


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._respond(with_body=False)

    def do_GET(self):
        self._respond(with_body=True)

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"refused by the test: {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _respond(self, with_body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.refusal is not None:
            return self._refuse(*self.hub.refusal)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            return self._list(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[2], match[3], with_body)
        return self._refuse(404, "RepoNotFound")

    def _known(self, repository, revision):
        if repository != "owner/name":
            self._refuse(404, "RepoNotFound")
            return False
        if revision not in (None, "main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
            return False
        return True

    def _list(self, repository, revision):
        if self._known(repository, revision):
            data = json.dumps(self.hub.listing()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _file(self, repository, revision, name, with_body):
        if not self._known(repository, revision):
            return None
        path = self.hub.folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        data = path.read_bytes()
        is_large = len(data) > LARGE
        etag = hashlib.sha256(data).hexdigest() if is_large else git_hash(data)
        if name in self.hub.wrong:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = 0
        if with_body and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        if is_large:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not with_body:
            return None
        if name in self.hub.cut:
            self.hub.cut.discard(name)
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(data[start:])
        return None


@contextlib.contextmanager
def serving(folder: pathlib.Path):
    """A running `Hub`."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
