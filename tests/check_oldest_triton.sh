#!/usr/bin/env bash
# The kernels on the oldest Triton that they support: compiled for Hopper, and run in its interpreter, which needs an
# older NumPy. Both are installed beside the environment, not into it.
# Usage: tests/check_oldest_triton.sh PATH_TO_BIN
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work" triton==3.6.0 numpy==2.3.5
PYTHONPATH="$work" "$bin/python" -c 'import triton; assert triton.__version__ == "3.6.0"'
PYTHONPATH="$work" "$bin/python" -m pytest -q --numprocesses=2 --dist=loadfile tests/kernels/attention/test_triton_compiles.py \
    tests/kernels/attention/test_triton_attention.py tests/kernels/rope
