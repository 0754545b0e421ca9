"""Small attention on the GPU, forward and backward, for a checker of memory to watch: runs, lists, split key tiles.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/benchmarks/kernels_small_cases.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/benchmarks/kernels_small_cases.py

`make sanitize-kernels` runs both. PYTORCH_NO_CUDA_MEMORY_CACHING=1 must be set: torch's cache would hide reads beyond a
tensor. Inputs are drawn and results compared on the CPU, so that few kernels but ours run under the checker.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels_in_place  # noqa: F401  # isort: skip  Makes `ropewalk.kernels` importable where it is not installed.
from attention_plans import random_blocks, with_sinks
from numerics import attention_inputs

from ropewalk.kernels.attention import (
    AttentionPlan,
    Implementation,
    anchor,
    block_lists,
    causal,
    sliding_window,
    sparse_attention,
)

TOKENS = 333
"""No multiple of a tile, so that the last tiles are cut off."""
LARGEST_ERROR = 0.05
"""Of bf16 against fp64; inputs are of order one."""


def plans() -> dict[str, AttentionPlan]:
    """A plan for each way through the kernels."""
    lists = block_lists(random_blocks(1, 2, TOKENS, 0, block_tokens=128), [[0, 100]], TOKENS)
    return {
        "causal": causal(1, TOKENS),
        "after a cache": causal(1, 100, TOKENS),
        "split key tiles": anchor([[0, *range(1, 1500, 60)]], 1500),
        "window with sinks": sliding_window([[0, 20]], TOKENS, window_tokens=50, num_sinks=3),
        "block lists": lists,
        "block lists with sinks": with_sinks(lists, 20),
    }


def main() -> None:
    """Run all; exits with 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    asked = parser.parse_args()
    if asked.device == "cuda" and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        parser.error("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: torch's cache would hide reads beyond a tensor")
    wrong = []
    for head_dim in asked.head_dims:
        for name, plan in plans().items():
            error = largest_error(plan, head_dim, asked.device)
            print(f"head_dim {head_dim}, {name}: largest error {error:.4f}", flush=True)
            if not error < LARGEST_ERROR:
                wrong.append((name, head_dim))
    sys.exit(f"wrong: {wrong}" if wrong else 0)


def largest_error(plan: AttentionPlan, head_dim: int, device: str) -> float:
    """Of out, dq, dk and dv, relative to the largest value of each."""
    # The interpreter, for a try without a GPU, knows no bf16.
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    given = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    found = results("triton", plan, given, device, dtype)
    exact = results("reference", plan, given, "cpu", torch.float64)
    return max(float((x - right).abs().max() / right.abs().max()) for x, right in zip(found, exact, strict=True))


def results(
    implementation: Implementation, plan: AttentionPlan, given: tuple[Tensor, ...], device: str, dtype: torch.dtype
) -> list[Tensor]:
    """[out, dq, dk, dv] of (q, k, v, dout), worked in a dtype on a device; in fp64 on the CPU."""
    q, k, v, dout = (x.detach().to(device, dtype) for x in given)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    out, _ = sparse_attention(q, k, v, plan.to(device), implementation=implementation)
    return [x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, leaves, dout))]


if __name__ == "__main__":
    main()
