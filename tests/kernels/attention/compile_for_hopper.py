"""Compiles every kernel in every shipped size for sm_90, without a GPU, and prints what ptxas says, as JSON lines.

Run as a command, without TRITON_INTERPRET: python compile_for_hopper.py [head_dim ...]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ropewalk.kernels.attention.on_triton import backward, forward, sizes

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    "lse": "*fp32",
    "lse_log2": "*fp32",
    "delta": "*fp32",
    "partial_sums": "*fp32",
    **dict.fromkeys(("lo", "hi", "glo", "ghi", "order", "runs", "entries", "items", "key_runs", "query_runs"), "*i32"),
    "offsets": "*i64",
    "scale": "fp32",
    "scale_log2": "fp32",
}
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
KERNELS = {
    "forward": forward.attention_forward,
    "keys": backward.attention_backward_keys,
    "queries": backward.attention_backward_queries,
}


def compile_kernel(name: str, head_dim: int, has_lists: bool) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, and whether the tensor cores' wgmma is used."""
    kernel = KERNELS[name]
    size = getattr(sizes.choose_sizes(head_dim, torch.bfloat16, None), name)
    constants = {
        "D": head_dim,
        "D_PADDED": triton.next_power_of_2(head_dim),
        "M": size.M,
        "N": size.N,
        "HAS_LISTS": has_lists,
        "IEEE": False,
    }
    signature = {}
    for argument in kernel.arg_names:
        kind = "*bf16" if argument in TENSORS else POINTERS.get(argument, "i32")
        signature[argument] = "constexpr" if argument in constants else kind
    # What the launcher finds out at run time: aligned pointers, and strides that are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or (argument.startswith("stride") and head_dim % 16 == 0)
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": size.num_warps, "num_stages": size.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "head_dim": head_dim,
        "lists": has_lists,
        "M": size.M,
        "N": size.N,
        **options,
        **ptxas(ptx),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
    }


def ptxas(ptx: str) -> dict[str, int]:
    """Registers of a thread and spilled bytes, from the assembler that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    program = get_ptxas(TARGET.arch).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(program), "-v", "--gpu-name=sm_90a", "-o", f"{folder}/kernel.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    return {"registers": int(registers[-1]), "spilled_bytes": sum(spilled)}


if __name__ == "__main__":
    for head_dim in [int(argument) for argument in sys.argv[1:]] or [64, 80, 96, 128, 256]:
        for name in KERNELS:
            for has_lists in (False, True):
                print(json.dumps(compile_kernel(name, head_dim, has_lists)), flush=True)
