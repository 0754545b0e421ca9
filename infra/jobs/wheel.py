"""The running code as a built wheel, unpacked into the folders that a Ray cluster is given for a job.

A wheel and not the sources: it holds the package under its own name, and nothing that lies beside it. Unpacked,
because of what Ray 2.60 does with a wheel file: `pip install --target` fetches all dependencies again on every node,
gigabytes of CUDA among them; a wheel of the same file name counts as known, so that changed code never arrives; and
two environments that need the same wheel at the same time remove it from under each other. Folders it knows by their
content.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ropewalk.infra.step import UserError

PACKAGE = "ropewalk"
MIN_SETUPTOOLS = 77
"""As the build system in pyproject.toml asks for."""
NOT_SHIPPED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
"""What an installer adds to a distribution's metadata."""


def unpack_wheel(folder: Path, wheel: Path | None = None) -> list[Path]:
    """Write the wheel's top folders (the package, and its metadata) into a folder, and return their paths.

    The wheel is the one given, or that of the code that runs here: from a checkout (editable install) built by the
    project's own build system, otherwise the installed files. Raises UserError if none can be had.
    """
    files = wheel_files(wheel) if wheel else _running_code()
    for name, content in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--wheel {wheel}: its file {name!r} leaves the folder that it is unpacked to")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _running_code() -> dict[str, bytes]:
    distribution = _distribution()
    checkout = _checkout(distribution)
    return _built(checkout) if checkout else _installed(distribution)


def _distribution() -> metadata.Distribution:
    # A checkout may also hold a *.egg-info folder, which is no installation: it has no RECORD.
    for distribution in metadata.distributions(name=PACKAGE):
        if distribution.read_text("RECORD") is not None:
            return distribution
    raise UserError(f"{PACKAGE} is not installed by pip here: build a wheel and pass it with --wheel FILE")


def _checkout(distribution: metadata.Distribution) -> Path | None:
    """The source folder of an editable install."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlsplit(origin["url"]).path))


def _built(checkout: Path) -> dict[str, bytes]:
    """Files of the wheel that the checkout builds, by name."""
    with tempfile.TemporaryDirectory(prefix="ropewalk-wheel-") as scratch:
        # From a copy: setuptools would leave a build/ folder behind, and pack what an earlier build left there.
        source = Path(scratch) / "source"
        _copy_sources(checkout, source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if int(metadata.version("setuptools").split(".")[0]) >= MIN_SETUPTOOLS:
            command.append("--no-build-isolation")
        done = subprocess.run(
            [*command, "--wheel-dir", scratch, str(source)], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()[-1]
            raise UserError(
                f"no wheel could be built from {checkout} ({said}): build one and pass it with --wheel FILE"
            )
        return wheel_files(wheels[0])


def _copy_sources(checkout: Path, target: Path) -> None:
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    target.mkdir()
    for name in ("pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]):
        shutil.copy(checkout / name, target / name)
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(checkout / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))


def _installed(distribution: metadata.Distribution) -> dict[str, bytes]:
    """Files of an installed wheel, by name, as its RECORD lists them."""
    files = {}
    for entry in distribution.files or ():
        if ".." in entry.parts or "__pycache__" in entry.parts or entry.name in NOT_SHIPPED:
            continue
        files[entry.as_posix()] = Path(str(entry.locate())).read_bytes()
    if not any(name.startswith(f"{PACKAGE}/") for name in files):
        raise UserError(f"the installation of {PACKAGE} lists no files: build a wheel and pass it with --wheel FILE")
    return files


def wheel_files(path: Path) -> dict[str, bytes]:
    """Content of each file of a wheel. Raises UserError if it is none of ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--wheel {path}: cannot be read ({error})") from None
    if not any(name.startswith(f"{PACKAGE}/") for name in files):
        raise UserError(f"--wheel {path}: this is no wheel of {PACKAGE}")
    return files
