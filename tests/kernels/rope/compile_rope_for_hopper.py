"""Compiles the rotation for sm_90, without a GPU, and prints what ptxas says, as JSON lines.

Run as a command, without TRITON_INTERPRET and with tests/kernels/attention on the path.
"""

import json

import triton
from compile_for_hopper import TARGET, ptxas
from triton.compiler import ASTSource

from ropewalk.kernels.rope import on_triton

INTEGERS = {"position_ids": "*i64", "frequencies": "*i64", "scaling": "fp32"}


def compile_rotation(num_pairs, inverse=False, dtype="*bf16"):
    kernel = on_triton.rotate_heads
    values = on_triton.constants(32, 8, num_pairs) | {"INVERSE": inverse}
    signature = {}
    for argument in kernel.arg_names:
        kind = dtype if argument in ("q", "k", "q_out", "k_out") else INTEGERS.get(argument, "i32")
        signature[argument] = "constexpr" if argument in values else kind
    # What the launcher finds out at run time: aligned pointers, and strides that are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
        or (argument.startswith("stride") and not argument.startswith("stride_p"))
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in values.items()}, aligned)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": on_triton.NUM_WARPS})
    ptx = compiled.asm["ptx"]
    described = {"pairs": num_pairs, "inverse": inverse, "dtype": dtype, "vector_loads": "ld.global.v" in ptx}
    return described | ptxas(ptx) | {"shared_bytes": compiled.metadata.shared}


if __name__ == "__main__":
    for pairs in (16, 32, 40, 48, 64, 128):
        for inverse in (False, True):
            print(json.dumps(compile_rotation(pairs, inverse)), flush=True)
    print(json.dumps(compile_rotation(64, dtype="*fp32")), flush=True)
