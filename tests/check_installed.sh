#!/usr/bin/env bash
# Types and import contracts, against a plain (not editable) install: with the editable mapping neither pyright nor
# import-linter resolves `ropewalk.*`.
# Usage: tests/check_installed.sh PATH_TO_BIN
set -euo pipefail
top=$(pwd)
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Built from a copy, so that no build/ folder is left in the checkout.
mkdir "$work/source"
cp -r pyproject.toml README.md LICENSE pipelines stages kernels infra "$work/source/"
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$work/source"
cd "$work"
export PYTHONPATH="$work/site"
"$bin/lint-imports" --config "$top/pyproject.toml" --no-cache
cat >"$work/pyrightconfig.json" <<JSON
{"include": ["site/ropewalk"], "extraPaths": ["site"], "pythonVersion": "3.11", "typeCheckingMode": "standard"}
JSON
"$bin/pyright" --project "$work/pyrightconfig.json" --pythonpath "$bin/python"
