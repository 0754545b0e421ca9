"""Runs one `ropewalk` command in this process and tells what it imported and which programs it started.

    python tests/command_probe.py RESULT.json run chain_pipeline.py --store folder

The result has `status`, `modules` (names of all imported modules) and `programs` (their command lines).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STARTING = ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork")


def main() -> int:
    result, *arguments = sys.argv[1:]
    programs: list[list[str]] = []

    def watch(event: str, details: tuple[Any, ...]) -> None:
        if event in STARTING:
            programs.append([event] if event == "os.fork" else [str(word) for word in details[1]])

    sys.addaudithook(watch)
    sys.argv = ["ropewalk", *arguments]
    status: Any = 0
    try:
        from ropewalk.pipelines.cli import main as ropewalk

        ropewalk()
    except SystemExit as end:
        status = end.code or 0
    document = {"status": status, "modules": sorted(sys.modules), "programs": programs}
    Path(result).write_text(json.dumps(document), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
