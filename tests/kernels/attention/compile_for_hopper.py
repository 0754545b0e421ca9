"""Compiles every kernel in its shipped sizes for sm_90, without a GPU, and prints what ptxas says, as JSON lines.

Run as a command, without TRITON_INTERPRET: python compile_for_hopper.py head_dim [dtype [block_tokens]]
Without block_tokens: plans with runs and plans with lists of 128-token blocks; with them, lists of such blocks alone.
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
KINDS = {
    "lse": "*fp32",
    "row_terms": "*fp32",
    **dict.fromkeys(("intervals", "order", "runs", "entries", "items", "key_runs", "query_runs"), "*i32"),
    "offsets": "*i64",
    "scale": "fp32",
    "scale_log2": "fp32",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = ("q", "k", "v", "dout")
TILES = {
    "forward": {"k": "N", "v": "N", "out": "M"},
    "keys": {"q": "M", "dout": "M", "dk": "N", "dv": "N"},
    "queries": {"k": "N", "v": "N", "dq": "M"},
}
"""Arguments that are descriptors of tiles with as many rows; dK/dV has some more."""
KERNELS = {
    "forward": forward.attention_forward,
    "keys": backward.attention_backward_keys,
    "queries": backward.attention_backward_queries,
}


def compile_kernel(name: str, head_dim: int, dtype: str, block_tokens: int | None, has_lists: bool) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, and how the tensor cores' wgmma is used."""
    kernel = KERNELS[name]
    size = getattr(sizes.choose_sizes(head_dim, DTYPES[dtype], block_tokens), name)
    constants = {
        "D": head_dim,
        "D_PADDED": sizes.padded_head_dim(head_dim),
        "M": size.M,
        "N": size.N,
        "HAS_LISTS": has_lists,
        "HAS_GAPS": False,
        "IEEE": False,
    }
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    kinds = {**KINDS, **dict.fromkeys(TENSORS, f"*{dtype}"), **descriptors(name, size, head_dim, dtype)}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
    # What the launcher finds out at run time: aligned pointers, and strides that are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument.startswith("stride") or argument == "padded_tokens"
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": size.num_warps, "num_stages": size.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "head_dim": head_dim,
        "dtype": dtype,
        "block_tokens": block_tokens,
        "lists": has_lists,
        "M": size.M,
        "N": size.N,
        **options,
        **ptxas(ptx),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S*?\.(m\d+n\d+)k", ptx))),
        "loops_ahead": loops_ahead(compiled.asm["ttgir"]),
    }


def descriptors(name: str, size: sizes.KernelSizes, head_dim: int, dtype: str) -> dict[str, str]:
    """The types of descriptors, which hold the shape of a tile."""
    columns = sizes.padded_head_dim(head_dim)
    kinds = {n: f"tensordesc<{dtype}[1,1,{getattr(size, rows)},{columns}]>" for n, rows in TILES[name].items()}
    if name == "keys":
        kinds["partial_sums"] = f"tensordesc<fp32[1,1,{size.N},{columns}]>"
        kinds["row_terms"], kinds["intervals"] = (f"tensordesc<{n}[1,1,1,{size.M}]>" for n in ("fp32", "i32"))
    return kinds


def loops_ahead(ttgir: str) -> list[bool]:
    """For each loop over tiles, whether it asks for the tiles of later steps: behind its first product, that is."""
    bodies = [body.split("scf.yield")[0] for body in ttgir.split("scf.for")[1:]]
    products = [re.split(r"ttng\.warp_group_dot |tt\.dot ", body) for body in bodies]
    return [
        "async_tma_copy" in "".join(after) and "async_tma_copy" not in before for before, *after in products if after
    ]


def ptxas(ptx: str) -> dict[str, Any]:
    """Registers of a thread, spilled bytes, and whether wgmma was serialised, from the assembler Triton brings."""
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
    return {
        "registers": int(registers[-1]),
        "spilled_bytes": sum(spilled),
        "serialised": "instructions are serialized" in done.stderr,
    }


if __name__ == "__main__":
    head_dim, dtype, *blocks = [*sys.argv[1:], "bf16"][:2] + sys.argv[3:]
    block_tokens = int(blocks[0]) if blocks else None
    for name in KERNELS:
        for has_lists in (False, True) if block_tokens is None else (True,):
            print(json.dumps(compile_kernel(name, int(head_dim), dtype, block_tokens, has_lists)), flush=True)
