"""Reading a record while it grows gives every event once, whole and in order."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.infra.step import UserError
from ropewalk.infra.tracking import event_tail
from ropewalk.infra.tracking.event_tail import EventTail


def lines(count: int, width: int = 10) -> list[bytes]:
    types = ["run_started", *["metrics"] * (count - 2), "run_finished"]
    return [json.dumps({"seq": n, "type": kind, "pad": "ä" * width}).encode() + b"\n" for n, kind in enumerate(types)]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=20), chunk=st.integers(1, 300), width=st.integers(0, 60))
def test_events_come_once_and_in_order_however_the_file_grows(cuts: list[int], chunk: int, width: int) -> None:
    text = b"".join(lines(30, width))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_tail, "CHUNK_BYTES", chunk)
        tail = EventTail(Path(folder) / "events.jsonl")
        seen: list[int] = []
        written = 0
        for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
            with tail.path.open("ab") as file:
                file.write(text[written:end])
            written = end
            num_complete = text[:end].count(b"\n")
            assert tail.last() == (json.loads(text[:end].splitlines()[num_complete - 1]) if num_complete else None)
            assert tail.has_ended() == (num_complete == 30)
            while events := tail.read():
                seen += [event["seq"] for event in events]
            assert seen == list(range(num_complete))
        tail.rewind()
        assert tail.read()[0]["seq"] == 0


def test_a_missing_file_is_an_empty_one(tmp_path: Path) -> None:
    tail = EventTail(tmp_path / "events.jsonl")
    assert (tail.read(), tail.first(), tail.last(), tail.has_ended()) == ([], None, None, False)


def test_a_record_that_begins_with_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(3)[1])
    with pytest.raises(UserError, match=r"events\.jsonl begins with metrics, not with run_started"):
        EventTail(path).first()
