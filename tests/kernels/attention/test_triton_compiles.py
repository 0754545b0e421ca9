"""Every kernel in its shipped sizes, compiled for Hopper without a GPU: no spills, shared memory that fits, wgmma."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MOST_SHARED_BYTES = 227 * 1024
MOST_SPILLED_BYTES = {("keys", head_dim): 600 for head_dim in (192, 256)}
"""What dK/dV padded to 256 columns spills, loads and stores together, with Triton 3.9: sizes.py."""
OTHERS = [pytest.param(d, "bf16", None, marks=pytest.mark.slow) for d in (32, 80, 96, 192, 256)]
BLOCKS = [
    pytest.param(d, "bf16", block, marks=[] if (d, block) == (128, 64) else pytest.mark.slow)
    for d in (64, 80, 128, 256)
    for block in (64, 32, 16)
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler says of the kernels of a head dim, dtype and block size; asked once for each."""
    found = {}

    def ask(head_dim, dtype, block_tokens):
        case = head_dim, dtype, block_tokens
        if case not in found:
            found[case] = compile_kernels(head_dim, dtype, block_tokens, tmp_path_factory.mktemp("triton"))
        return found[case]

    return ask


def compile_kernels(head_dim, dtype, block_tokens, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    # With it the kernels are made for the interpreter, which compiles nothing.
    environment.pop("TRITON_INTERPRET", None)
    blocks = [] if block_tokens is None else [str(block_tokens)]
    script = str(Path(__file__).with_name("compile_for_hopper.py"))
    command = [sys.executable, "-W", "ignore", script, str(head_dim), dtype, *blocks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["kernel"], row["lists"]) for row in rows} == {
        (kernel, lists)
        for kernel in ("forward", "keys", "queries")
        for lists in ((False, True) if block_tokens is None else (True,))
    }
    return rows


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block_tokens"),
    [(64, "bf16", None), (128, "bf16", None), (128, "fp16", None), *OTHERS, *BLOCKS],
)
def test_kernels_keep_all_in_registers_fit_shared_memory_and_ask_for_tiles_ahead(
    compiled, head_dim, dtype, block_tokens
):
    for row in compiled(head_dim, dtype, block_tokens):
        assert row["spilled_bytes"] <= MOST_SPILLED_BYTES.get((row["kernel"], head_dim), 0), row
        assert row["shared_bytes"] <= MOST_SHARED_BYTES, row
        assert row["loops_ahead"] == [True, True], row
        assert bool(row["wgmma"]) == (row["block_tokens"] in (None, 64)), row
        assert not row["serialised"], row


def test_wgmma_is_at_least_64_wide(compiled):
    for head_dim in (64, 128):
        for row in compiled(head_dim, "bf16", None):
            assert all(int(shape.split("n")[1]) >= 64 for shape in row["wgmma"]), row
