"""A hub of one data set on loopback, and a process that ingests from it: the libraries read HF_ENDPOINT at import.

Run as `python small_hub.py WORK`; prints the documents as JSON. The paths are those of the Hugging Face hub's HTTP API.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path

COMMIT = "a1" * 20
CONTENT = b'{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n'
FILE = "train.jsonl"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `org/name` at one commit, and nothing else."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        etag = hashlib.sha1(CONTENT).hexdigest()
        if path == f"/api/datasets/org/name/revision/{COMMIT}":
            info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": FILE}], "tags": [], "private": False}
            self.answer(200, json.dumps(info).encode())
        elif path == f"/api/datasets/org/name/tree/{COMMIT}":
            tree = [{"type": "file", "path": FILE, "size": len(CONTENT), "oid": etag}]
            self.answer(200, json.dumps(tree).encode())
        elif path == f"/datasets/org/name/resolve/{COMMIT}/{FILE}":
            self.answer(200, CONTENT, ETag=f'"{etag}"')
        else:
            self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main(work: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(work / "home"))

    from ropewalk.stages.data.reading.readers import SourceConfig, open_source

    fields = {"name": "s", "format": "huggingface", "dataset": "org/name", "revision": COMMIT}
    source = SourceConfig.model_validate({**fields, "metadata_fields": ["n"]})
    documents = [vars(document) for part in open_source(source, None, work) for document in part()]
    print(json.dumps(documents))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
