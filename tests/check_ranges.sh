#!/usr/bin/env bash
# The package's own version ranges, with only torch constrained: a second environment, `pip install .`, every room
# imported. GPU users install like this.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/python -m pip install --quiet --disable-pip-version-check"
grep '^torch==' constraints.txt >"$work/torch.txt"
$pip --requirement "$work/torch.txt"
mkdir "$work/source"
cp -r pyproject.toml README.md LICENSE pipelines stages kernels infra "$work/source/"
$pip --constraint "$work/torch.txt" "$work/source"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import importlib
import importlib.util
from pathlib import Path

import ropewalk

# By file: the rooms are namespace packages, which pkgutil does not walk into.
root = Path(list(ropewalk.__path__)[0])
files = [path.relative_to(root).with_suffix("") for path in root.rglob("*.py") if path.name != "__init__.py"]
names = sorted("ropewalk." + ".".join(path.parts) for path in files)
# The CPU builds of torch come without Triton, those for GPUs bring it.
if importlib.util.find_spec("triton") is None:
    names = [name for name in names if "on_triton" not in name]
for name in names:
    importlib.import_module(name)
assert len(names) > 50, names
print(f"open ranges: {len(names)} modules import")
PY
"$work/venv/bin/ropewalk" plan quickstart --json >"$work/plan.json"
echo "open ranges: ropewalk plan quickstart works"
