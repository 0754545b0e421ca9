"""What the commands write, whatever it is written to: a pipe that closes, a narrow encoding, no stream at all."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROPEWALK = [sys.executable, "-m", "ropewalk.pipelines.cli"]
PIPELINE = """
import time
from pydantic import BaseModel
from ropewalk.infra.step import Pipeline, Step

class Config(BaseModel):
    note: str = "grün → ✓"
    seconds: float = 0.0

class stage:
    NAME, VERSION = "noted", 1

    @staticmethod
    def run(config, inputs, output, context):
        print(config.note)
        time.sleep(config.seconds)
        context.log({"loss": float("nan")})
        (output.data / "note.txt").write_text(config.note, encoding="utf-8")

def pipeline(*, slow_import: float = 0.0, slow: float = 0.0) -> Pipeline:
    time.sleep(slow_import)
    return Pipeline("noted", tuple(Step(f"step-{n}", stage, Config(seconds=slow)) for n in range(3)))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a pipeline that has run once."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "noted.py").write_text(PIPELINE, encoding="utf-8")
    assert ropewalk(folder, "run", "noted.py", "--executor", "local").returncode == 0
    return folder


def environment(home, **variables):
    return {**os.environ, "ROPEWALK_STORE": str(home / "store"), "PYTHONUNBUFFERED": "", **variables}


def ropewalk(home, *words, **variables):
    call = [*ROPEWALK, *words]
    return subprocess.run(call, cwd=home, env=environment(home, **variables), capture_output=True, check=False)


def shell(home, line):
    """A line of bash, in which $ropewalk is the command."""
    variables = environment(home, ropewalk=" ".join(ROPEWALK))
    return subprocess.run(["bash", "-c", line], cwd=home, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words", ["status", "status --json", "show last", "show last step-0", "logs last", "graph noted.py", "--help"]
)
def test_a_reader_that_goes_away_is_no_error(home, words):
    done = shell(home, f"$ropewalk {words} | true; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == "" and done.returncode in (0, 1)


def test_a_run_goes_on_when_nobody_reads_what_it_shows(home):
    done = shell(home, "$ropewalk run noted.py --executor local --force step-2 | true; exit ${PIPESTATUS[0]}")
    assert done.stderr == "" and done.returncode == 0
    shown = json.loads(ropewalk(home, "status", "--json").stdout)["runs"][0]
    assert shown["status"] == "succeeded" and shown["steps"] == {"reused": 2, "ran": 1}


def test_a_run_goes_on_when_its_terminal_is_gone(home):
    parent, child = pty.openpty()
    call = [*ROPEWALK, "run", "noted.py", "--executor", "local", "--set", "step-0.seconds=3"]
    process = subprocess.Popen(call, cwd=home, env=environment(home), stdout=child, stderr=child, stdin=child)
    os.close(child)
    while b"running" not in os.read(parent, 65536):
        pass
    os.close(parent)
    assert process.wait(timeout=60) == 0
    assert json.loads(ropewalk(home, "status", "--json").stdout)["runs"][0]["status"] == "succeeded"


@pytest.mark.parametrize(("before", "ending"), [([], (130, "cancelled")), (["nohup"], (0, "succeeded"))])
def test_a_hangup_stops_a_run_as_ctrl_c_does_unless_it_is_ignored(home, before, ending):
    words = ["run", "noted.py", "--executor", "local", "--json", "--set", f"step-0.seconds={5 + len(before)}"]
    options = {"cwd": home, "env": environment(home), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*before, *ROPEWALK, *words], **options) as process:
        assert any(b"step-0: started" in line for line in process.stderr)
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(output)["status"]) == ending


def test_streams_that_are_closed_are_no_error(home):
    assert shell(home, "$ropewalk status >&-").returncode == 0
    assert shell(home, "$ropewalk show nothing 2>&-").returncode == 1
    assert shell(home, "$ropewalk run noted.py --executor local --force step-1 >&- 2>&- <&-").returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_narrow_encoding_loses_characters_and_nothing_else(home, encoding):
    words = ("run", "noted.py", "--executor", "local", "--set", f'step-0.note="naïve {encoding} → ✓"')
    done = ropewalk(home, *words, "--json", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding))["status"] == "succeeded"
    shown = ropewalk(home, "show", "last", "step-0", "--json", PYTHONIOENCODING=encoding).stdout.decode(encoding)
    assert json.loads(shown)["config"]["note"] == f"naïve {encoding} → ✓"
    assert ropewalk(home, "logs", "last", PYTHONIOENCODING=encoding).returncode == 0
    assert f"run {json.loads(shown)['run_id']}" in ropewalk(home, "show", "last").stdout.decode()


def test_a_number_that_json_does_not_have_is_a_string(home):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    ropewalk(home, "run", "noted.py", "--executor", "local", "--force", "step-0")
    shown = json.loads(ropewalk(home, "show", "last", "step-0", "--json").stdout, parse_constant=refuse)
    assert shown["metrics"] == {"loss": "nan"}


@pytest.mark.parametrize("words", [("run", "noted.py", "--executor", "local"), ("status",), ("verify",), ("gc",)])
def test_a_file_gets_no_control_characters_and_whole_lines(home, words):
    done = ropewalk(home, *words, COLUMNS="40", TERM="xterm-256color")
    assert done.returncode == 0
    for text in (done.stdout.decode(), done.stderr.decode()):
        assert all(letter.isprintable() or letter == "\n" for letter in text), text
    if words == ("status",):
        assert all("noted" in line for line in done.stdout.decode().splitlines()[1:]), "a row is one line"


def test_a_terminal_gets_colours_and_a_live_table(home):
    assert "\x1b[" in on_terminal(home, "run", "noted.py", "--executor", "local", "--force", "step-0")


def on_terminal(home, *words):
    """What a command writes to a terminal."""
    parent, child = pty.openpty()
    variables = environment(home, TERM="xterm-256color")
    with subprocess.Popen([*ROPEWALK, *words], cwd=home, env=variables, stdout=child, stderr=child, stdin=child) as ran:
        os.close(child)
        shown = b""
        while True:
            try:
                more = os.read(parent, 65536)
            except OSError:
                break
            if not more:
                break
            shown += more
    os.close(parent)
    assert ran.returncode == 0
    return shown.decode()


@pytest.mark.parametrize("words", [("plan",), ("run", "--executor", "local"), ("explain", "step-0"), ("graph",)])
def test_ctrl_c_while_a_pipeline_is_loaded_ends_the_command_in_one_sentence(home, words):
    call = [*ROPEWALK, words[0], "noted.py", *words[1:], "--param", "slow_import=60", "--json"]
    process = subprocess.Popen(call, cwd=home, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until_it_sleeps(process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(output) == {"error": "interrupted"} and errors.decode() == "ropewalk: interrupted\n"


def wait_until_it_sleeps(process):
    """Until the process has done its imports and is in the pipeline's own sleep."""
    last, still = -1, 0
    while still < 5:
        assert process.poll() is None
        used = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        still = still + 1 if used == last and used > 5 else 0
        last = used
        time.sleep(0.1)
