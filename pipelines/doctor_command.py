"""What `doctor` does: shows what it found, and what to do about it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ropewalk.infra.doctor.report import diagnose
from ropewalk.pipelines.output import console_on, emit

MARKS = {True: Text("ok", "green"), False: Text("wrong", "red"), None: Text("note", "yellow")}


def show_diagnosis(store_uri: str, address: str | None, as_json: bool) -> int:
    """Check the machine, the store and what they talk to; 1 if something is wrong."""
    with Console(stderr=True).status("looking"):
        checks = diagnose(store_uri, address)
    if as_json:
        emit({"checks": [{"name": check.name, "ok": check.ok, "message": check.message} for check in checks]})
    else:
        table = Table("check", "", "finding", box=None, pad_edge=False)
        for check in checks:
            table.add_row(check.name, MARKS[check.ok], Text(check.message))
        console_on().print(table)
    return 1 if any(check.ok is False for check in checks) else 0
