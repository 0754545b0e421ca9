"""How far attention scores in bfloat16 are off, by the arithmetic of the rotary embedding and the place in the row.

    python tests/benchmarks/rope_precision.py --output rope_precision.json

Root mean square errors against fp64 of scores (scale 1 / sqrt(128)) between 256 random queries and keys of one head,
rounded to bfloat16 first, over 8 heads, at consecutive positions from an offset on; base 500,000. A few seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measurements import write_measurements
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ropewalk.kernels.rope import apply_rope

OFFSETS = (0, 2**13, 2**17, 2**20)
Pair = tuple[Tensor, Tensor]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="write the numbers to this JSON file")
    asked = parser.parse_args()
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    rotary = LlamaRotaryEmbedding(LlamaConfig(num_attention_heads=1, head_dim=128, rope_parameters=parameters))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 8, 256, 128, generator=generator).bfloat16() for _ in range(2))
    numbers = {
        name: {str(offset): error(turn, q, k, torch.arange(256)[None] + offset, rotary) for offset in OFFSETS}
        for name, turn in FORMS.items()
    }
    write_measurements(asked.output, numbers, ("torch", "transformers"))
    print(json.dumps(numbers, indent=1))


def error(turn: Callable[..., Pair], q: Tensor, k: Tensor, positions: Tensor, rotary: LlamaRotaryEmbedding) -> float:
    """Of the scores, root mean square."""
    right = apply_rope(q.double(), k.double(), positions, rotary.inv_freq, implementation="reference")
    scores = [a.double() @ b.double().mT / 128**0.5 for a, b in (turn(q, k, positions, rotary), right)]
    return (scores[0] - scores[1]).square().mean().sqrt().item()


def angles_in_bfloat16(q: Tensor, k: Tensor, positions: Tensor, rotary: LlamaRotaryEmbedding) -> Pair:
    """What casting the whole model, frequencies included, and its positions makes of it."""
    angles = positions[..., None].bfloat16() * rotary.inv_freq.bfloat16()
    angles = torch.cat((angles, angles), dim=-1)
    return apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())


def transformers_form(q: Tensor, k: Tensor, positions: Tensor, rotary: LlamaRotaryEmbedding) -> Pair:
    """Angles in float32, cos and sin rounded to bfloat16, the turn worked in bfloat16."""
    return apply_rotary_pos_emb(q, k, *rotary(q, positions))


def exact(q: Tensor, k: Tensor, positions: Tensor, rotary: LlamaRotaryEmbedding) -> Pair:
    """Ours."""
    return apply_rope(q, k, positions, rotary.inv_freq)


FORMS: dict[str, Callable[..., Pair]] = {
    "angles in bfloat16": angles_in_bfloat16,
    "transformers": transformers_form,
    "kernels/rope": exact,
}

if __name__ == "__main__":
    main()
