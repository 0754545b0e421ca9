"""Checks of this machine: packages, memory, disk, GPUs, and whether the training packages really import."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "mlflow",
    "datasets",
    "pyarrow",
    "pydantic",
    "bm25s",
    "faiss-cpu",
    "matplotlib",
)
MIN_TRANSFORMERS = (5, 16)
MIN_FREE_GIB = 5.0
MIN_SHM_GIB = 1.0
MIN_MEMORY_GIB = 4.0
IMPORT_SECONDS = 180
GIB = 2**30
PROBE = """
import json, os, warnings
warnings.simplefilter("ignore")
import torch
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "deepspeed": deepspeed.__version__}
print(json.dumps({**versions, "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))
"""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool | None
    """None: nothing wrong, but worth knowing, or it could not be found out."""
    message: str


def check_python() -> Check:
    """The Python version."""
    return Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or later is needed)")


def check_packages() -> Check:
    """The packages are installed, and transformers is recent enough to live beside a folder called `kernels`."""
    found, missing = {}, []
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", False, f"missing: {', '.join(missing)}; pip install -e . installs them")
    if _version(found["transformers"]) < MIN_TRANSFORMERS:
        needed = ".".join(map(str, MIN_TRANSFORMERS))
        return Check("packages", False, f"transformers {found['transformers']} is too old: {needed} is needed")
    return Check("packages", True, ", ".join(f"{name} {version}" for name, version in found.items()))


def check_import_names() -> Check:
    """No regular package in the working directory hides Hugging Face's `kernels`, which transformers imports.

    A folder of that name without `__init__.py` is harmless: an installed package goes before it.
    """
    spec = PathFinder.find_spec("kernels", [str(Path.cwd())])
    if spec is not None and spec.origin:
        message = f"{spec.origin} hides Hugging Face's package `kernels` and breaks transformers: rename or delete it"
        return Check("import names", False, message)
    return Check("import names", True, "nothing here hides the package `kernels`")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """/dev/shm, where Ray keeps its objects; containers often have 64 MB."""
    if not path.exists():
        return Check("shared memory", None, f"{path} does not exist: Ray falls back to files, which is slower")
    total_gib = shutil.disk_usage(path).total / GIB
    message = f"{path} has {total_gib:.1f} GiB"
    if total_gib >= MIN_SHM_GIB:
        return Check("shared memory", True, message)
    return Check("shared memory", False, f"{message}: start the container with --shm-size=2g or more")


def check_memory() -> Check:
    """Memory that this process may use, by its control group if that is narrower than the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text(encoding="utf-8")))
    gib = total / GIB
    message = f"{gib:.1f} GiB, {os.cpu_count()} processors"
    return Check("memory", gib >= MIN_MEMORY_GIB, message + ("" if gib >= MIN_MEMORY_GIB else "; 4 GiB are needed"))


def check_disk(store_root: Path) -> Check:
    """Free space where the store lies."""
    folder = next((path for path in (store_root, *store_root.absolute().parents) if path.exists()), Path("/"))
    free_gib = shutil.disk_usage(folder).free / GIB
    enough = free_gib >= MIN_FREE_GIB
    message = f"{free_gib:.1f} GiB free for {store_root}"
    return Check("disk", enough, message if enough else f"{message}; the quickstart wants {MIN_FREE_GIB:.0f}")


def check_training() -> list[Check]:
    """torch and DeepSpeed import, and torch sees the GPUs that the driver sees.

    In a process of its own, as a training rank imports them: both have failed to for want of a compiler or a driver.
    """
    driver = driver_gpus()
    try:
        command = [sys.executable, "-c", PROBE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [Check("training", False, f"importing torch and deepspeed takes more than {IMPORT_SECONDS} s")]
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return [Check("training", False, f"torch or deepspeed cannot be imported: {last}; install them anew")]
    found = json.loads(lines[-1])
    both = f"torch {found['torch']} and deepspeed {found['deepspeed']} import"
    return [Check("training", True, both), _judge_gpus(found, driver)]


def driver_gpus() -> list[str]:
    """Names of the GPUs that NVIDIA's driver tells of; none where there is no driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _judge_gpus(found: dict[str, Any], driver: list[str]) -> Check:
    gpus = found["gpus"]
    if gpus:
        return Check("gpu", True, f"{', '.join(gpus)}; CUDA {found['cuda']}")
    if not driver:
        return Check("gpu", None, "none: everything runs on the processors")
    there = f"the driver knows {', '.join(driver)}, but torch {found['torch']}"
    if not found["cuda"]:
        return Check("gpu", False, f"{there} is a CPU build: install one for CUDA")
    hint = "look at CUDA_VISIBLE_DEVICES, and whether the driver is older than that CUDA"
    return Check("gpu", False, f"{there}, built for CUDA {found['cuda']}, sees none: {hint}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
