"""A pipeline of one step that writes down what it was given to read."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from ropewalk.infra.results import RunResult
from ropewalk.infra.step import External, Pipeline, Step
from ropewalk.infra.store import Store


class Nothing(BaseModel):
    """No config."""


class contents:  # noqa: N801
    """Writes the text of every file that it was given, by its path."""

    NAME, VERSION = "contents", 1

    @staticmethod
    def run(config, inputs, output, context):
        root = inputs["file"]
        paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        base = root.parent if root.is_file() else root
        texts = {p.relative_to(base).as_posix(): p.read_text() for p in paths if ".cache" not in p.parts}
        (output.data / "value.json").write_text(json.dumps(texts))


def reading(uri: str, **patterns: Any) -> Pipeline:
    """A pipeline that reads an outside input."""
    return Pipeline("p", (Step("read", contents, Nothing(), inputs={"file": External(uri, **patterns)}),))


def texts(store: Store, result: RunResult) -> dict[str, str]:
    """What the step has read."""
    commit = result.steps[0].commit
    assert commit is not None
    return json.loads((store.fetch(commit.uri) / "value.json").read_text())
