"""A pipeline that reads a repository of the small hub. Run as `python hub_pipeline.py WORK`; prints facts as JSON."""

import json
import os
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from small_hub import COMMIT, Hub

requests = []


class CountingHub(Hub):
    def do_GET(self):  # noqa: N802 - the name is the base class's
        requests.append(self.path)
        super().do_GET()

    do_HEAD = do_GET


def main(work: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), CountingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(work / "home"))
    from engine import plan, run, statuses
    from toy_reader import reading, texts

    from ropewalk.infra.adopt import adopt
    from ropewalk.infra.step import External
    from ropewalk.infra.store import Store

    source, root = f"hf://datasets/org/name@{COMMIT}", work / "store"
    adopt(Store(root), source, "name", External(source), copy=False)
    planned = {name: status for name, (status, _) in plan(reading("adopted://name"), root).items()}
    facts = {"planned": planned, "requests_of_planning": len(requests)}
    result = run(reading("adopted://name"), root)
    facts |= {"statuses": statuses(result), "reason": result.steps[0].reason}
    facts["value"] = texts(Store(root), result)
    facts["again"] = statuses(run(reading(source), root))
    adopt(Store(root), source, "copied", External(source), copy=True)
    server.shutdown()
    facts["copied"] = statuses(run(reading("adopted://copied"), root))
    copy = Store(root).fetch("adopted://copied/000000")
    facts["files_of_copy"] = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
