"""Our folder `kernels` never stands in for Hugging Face's package of that name, nor the other way round.

The repository root is first on the path of these fresh interpreters, where the folder is visible as `kernels`.
"""

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

RUN_A_TINY_LLAMA = """
import torch
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
logits = LlamaForCausalLM(config)(torch.arange(5).unsqueeze(0)).logits
assert logits.shape == (1, 5, 16) and logits.isfinite().all()
from ropewalk.kernels.attention import sparse_attention
"""


def run(code, *site_folders):
    path = os.pathsep.join(map(str, (REPOSITORY, *site_folders)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def module_folder(name):
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent


def names_transformers_imports_from_kernels():
    """Read from the installed transformers, so that the stub keeps up with it."""
    source = (module_folder("transformers") / "integrations" / "hub_kernels.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return sorted({alias.name for node in imports if node.module == "kernels" for alias in node.names})


def kernels_version_in_range():
    source = (module_folder("transformers") / "utils" / "import_utils.py").read_text(encoding="utf-8")
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return next(
        node.value.value
        for node in assigned
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "KERNELS_MIN_VERSION"
    )


@pytest.fixture
def site_with_kernels(tmp_path):
    """A site folder with a package and a distribution named `kernels`, whose decorators leave layers as they are."""
    package = tmp_path / "kernels"
    package.mkdir()
    lines = ["class _Anything:", "    def __init__(self, *args, **kwargs): ..."]
    lines += ["    def __call__(self, decorated): return decorated"]
    lines += [f"class {name}(_Anything): ..." for name in names_transformers_imports_from_kernels()]
    (package / "__init__.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    version = kernels_version_in_range()
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n", encoding="utf-8")
    return tmp_path


def test_transformers_works_without_hugging_face_kernels():
    if "kernels" in {name.lower() for dist in importlib.metadata.distributions() if (name := dist.name)}:
        pytest.skip("this environment has Hugging Face's kernels")
    output = run(RUN_A_TINY_LLAMA + "print(is_kernels_available())")
    assert output.split() == ["False"]


def test_transformers_gets_hugging_face_kernels_when_installed(site_with_kernels):
    code = RUN_A_TINY_LLAMA + "import kernels; print(is_kernels_available(), kernels.__file__)"
    available, path = run(code, site_with_kernels).split()
    assert available == "True"
    assert Path(path) == site_with_kernels / "kernels" / "__init__.py"


def test_importing_attention_imports_torch_and_nothing_else_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import ropewalk.kernels.attention; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    added = set(run(code).split())
    assert "ropewalk" in added
    assert not added & {"triton", "numpy", "transformers", "pydantic", "pyarrow", "ray"}


def test_kernels_is_a_plain_folder():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
