"""The code that clusters get: the wheel of what runs here, unpacked."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from ropewalk.infra.jobs import wheel
from ropewalk.infra.step import UserError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return folder, wheel.unpack_wheel(folder)


def files(folder):
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


def make_wheel(path, **content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name.replace("__", "/") + ".py", text)
    return path


def test_it_holds_every_module_of_the_package_and_nothing_beside_it(unpacked):
    folder, tops = unpacked
    version = metadata.version("ropewalk")
    assert [path.name for path in tops] == ["ropewalk", f"ropewalk-{version}.dist-info"]
    sources = {
        f"ropewalk/{path.relative_to(REPOSITORY).as_posix()}"
        for room in ("pipelines", "stages", "kernels", "infra")
        for path in (REPOSITORY / room).rglob("*.py")
    }
    assert {name for name in files(folder) if name.endswith(".py")} == sources
    assert "ropewalk/stages/evaluation/report.html" in files(folder)


def test_python_runs_it_from_there_and_knows_its_version(unpacked, tmp_path):
    folder, _ = unpacked
    code = (
        "import ropewalk.infra.step as step, importlib.metadata as m;"
        "print(step.__file__); print(m.version('ropewalk')); print(m.distribution('ropewalk')._path)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(folder)}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version = metadata.version("ropewalk")
    expected = [folder / "ropewalk/infra/step.py", version, folder / f"ropewalk-{version}.dist-info"]
    assert done.stdout.split() == [str(line) for line in expected]


def test_the_checkout_is_left_as_it_was(unpacked, tmp_path):
    """A build in place would leave a build/ folder, and pack what an earlier one left there."""
    before = {path.name for path in REPOSITORY.iterdir()}
    stamp = (REPOSITORY / "build").stat().st_mtime_ns if (REPOSITORY / "build").exists() else None
    wheel.unpack_wheel(tmp_path)
    assert {path.name for path in REPOSITORY.iterdir()} == before
    assert stamp is None or (REPOSITORY / "build").stat().st_mtime_ns == stamp


def test_an_installed_wheel_is_put_together_from_its_record(unpacked, tmp_path):
    folder, _ = unpacked
    built = tmp_path / "built"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    source = tmp_path / "source"
    wheel._copy_sources(REPOSITORY, source)
    subprocess.run([*command, "--target", str(built), str(source)], check=True, capture_output=True)
    out = tmp_path / "out"
    code = (
        f"import pathlib; from ropewalk.infra.jobs.wheel import unpack_wheel; unpack_wheel(pathlib.Path({str(out)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(built)}, cwd=tmp_path, check=True)
    assert files(out) == {name for name in files(folder) if not name.endswith("/RECORD")}


def test_a_wheel_of_the_users_own_is_taken(tmp_path):
    own = make_wheel(tmp_path / "ropewalk-9.9-py3-none-any.whl", ropewalk__infra__step="x = 1\n")
    [top] = wheel.unpack_wheel(tmp_path / "out", own)
    assert (top / "infra/step.py").read_text() == "x = 1\n"


@pytest.mark.parametrize("content", [b"", b"no zip"])
def test_a_file_that_is_no_wheel_is_refused(tmp_path, content):
    path = tmp_path / "x.whl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--wheel .*x\.whl: cannot be read"):
        wheel.unpack_wheel(tmp_path / "out", path)


def test_a_wheel_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="this is no wheel of ropewalk"):
        wheel.unpack_wheel(tmp_path / "out", make_wheel(tmp_path / "other.whl", other__code=""))


def test_a_wheel_whose_files_leave_the_folder_is_refused(tmp_path):
    own = make_wheel(tmp_path / "x.whl", ropewalk__a="", **{"..__outside": ""})
    with pytest.raises(UserError, match=r"its file '\.\./outside\.py' leaves the folder"):
        wheel.unpack_wheel(tmp_path / "out", own)
    assert not (tmp_path / "outside.py").exists()
