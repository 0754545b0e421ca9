"""How long a training step of a stack of Llama-3.1-8B's layers takes, under full and under masked attention.

    python tests/benchmarks/layer_stack_speed.py --output layer_stack.json
    python tests/benchmarks/layer_stack_speed.py --layers 32 --variants "sdpa cudnn" "anchor 16" --steps 1
    python tests/benchmarks/layer_stack_speed.py --preset tiny --device cpu

transformers' own LlamaModel with random bf16 weights, inputs in place of embeddings, no loss head, every layer
checkpointed; forward and backward of one row of 128K tokens. Needs torch, transformers and, on a GPU, triton. A step of
attention `ropewalk` builds its plan from policies and segments, as the trainer does for each batch. Stock `sdpa` is
full causal attention by torch's backend of that name.

`no attention` adds queries, keys and values up in place of attention: what all else takes. attention_share is 1 minus
its time over the step's. of_full is the step's time over that of the fastest full attention. Seconds are medians; the
file is written anew after every variant, and what --minutes leave no time for is named.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels_in_place  # noqa: F401  # isort: skip  Makes `ropewalk` importable where it is not installed.
from kernels_speed import gpu, synchronize, versions
from measurements import commit, machine

from ropewalk.stages.training.attention import ATTENTION_NAME, plan_for_rows, register

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"tokens": 256, "layers": 2, "hidden": 64, "mlp": 128, "heads": (4, 2), "steps": 2, "minutes": 1.0},
    "8b": {"tokens": 131072, "layers": 4, "hidden": 4096, "mlp": 14336, "heads": (32, 8), "steps": 3, "minutes": 7.0},
}
WITHOUT_ATTENTION = "no_attention"


@dataclass(frozen=True)
class Variant:
    """One kind of attention in every layer."""

    name: str
    implementation: str
    """As transformers knows it."""
    policy: str = "causal"
    documents: int = 1
    backend: str | None = None
    """Of torch's own attention."""

    @property
    def is_full(self) -> bool:
        """Whether every query sees all before it."""
        return self.implementation != WITHOUT_ATTENTION and self.policy == "causal"


GPU_VARIANTS = (
    Variant("sdpa cudnn", "sdpa", backend="CUDNN_ATTENTION"),
    Variant("anchor 16", ATTENTION_NAME, "anchor", 16),
    Variant("no attention", WITHOUT_ATTENTION),
    Variant("causal", ATTENTION_NAME),
    Variant("anchor 64", ATTENTION_NAME, "anchor", 64),
    Variant("document 16", ATTENTION_NAME, "document", 16),
    Variant("document 64", ATTENTION_NAME, "document", 64),
    Variant("sdpa flash", "sdpa", backend="FLASH_ATTENTION"),
)
"""The most wanted first."""
CPU_VARIANTS = (Variant("sdpa", "sdpa"), *(v for v in GPU_VARIANTS if v.backend is None))


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="8b")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int, help="timed ones, after a first that compiles")
    parser.add_argument("--minutes", type=float, help="begin no variant after so long")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=", ".join(v.name for v in GPU_VARIANTS))
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --preset tiny --device cpu tries the script out")
    given = {"tokens", "layers", "steps", "minutes"}
    preset = PRESETS[asked.preset] | {name: n for name in given if (n := getattr(asked, name)) is not None}
    variants = [
        variant
        for variant in (CPU_VARIANTS if asked.device == "cpu" else GPU_VARIANTS)
        if not asked.variants or variant.name in asked.variants
    ]
    if asked.variants and len(variants) < len(asked.variants):
        parser.error(f"--variants must be of {', '.join(v.name for v in GPU_VARIANTS)}, got {asked.variants}")
    until = time.monotonic() + 60 * preset["minutes"]
    document = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine() | {"gpu": gpu(asked.device)},
        "versions": {"python": platform.python_version(), **versions()},
        "shape": preset,
        "steps": [],
        "left_out": [],
    }
    measure_all(document, variants, preset, asked.device, until, asked.output)
    write(document, asked.output)
    print(table(document["steps"]))
    for name in document["left_out"]:
        print("left out, no time:", name)


def measure_all(
    document: dict[str, Any],
    variants: list[Variant],
    preset: dict[str, Any],
    device: str,
    until: float,
    path: Path | None,
) -> None:
    """Times of every variant on one model; what fails is noted with its message."""
    register()
    register_without_attention()
    model = build_stack(preset, device)
    for variant in variants:
        if time.monotonic() > until:
            document["left_out"].append(variant.name)
            continue
        row: dict[str, Any] = {"name": variant.name, "is_full": variant.is_full}
        try:
            row |= timed_steps(model, variant, preset, device)
        except Exception as error:  # noqa: BLE001  What fails must not stop the rest.
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        document["steps"].append(row)
        compare(document["steps"])
        print(row, file=sys.stderr, flush=True)
        write(document, path)


def write(document: dict[str, Any], path: Path | None) -> None:
    """All so far, if there is a file for it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def build_stack(preset: dict[str, Any], device: str) -> Any:
    """A LlamaModel in training mode, in bf16 on a GPU, its layers checkpointed; its embeddings are not used."""
    from transformers import AutoModel, LlamaConfig

    num_heads, num_kv_heads = preset["heads"]
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=preset["hidden"],
        intermediate_size=preset["mlp"],
        num_hidden_layers=preset["layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=preset["tokens"],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model.train()
    model.gradient_checkpointing_enable()
    return model


def timed_steps(model: Any, variant: Variant, preset: dict[str, Any], device: str) -> dict[str, Any]:
    """Seconds a step, the first one's apart, and the most memory one takes, weights and gradients included."""
    model.set_attn_implementation(variant.implementation)
    tokens, dtype = preset["tokens"], next(model.parameters()).dtype
    generator = torch.Generator(device).manual_seed(0)
    inputs, gradient = (
        torch.randn(1, tokens, preset["hidden"], generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    inputs.requires_grad_()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        inputs.grad = None
        given: dict[str, Any] = {}
        if variant.implementation == ATTENTION_NAME:
            given["attention_plan"] = plan_for_rows([variant.policy], [segments(variant, tokens)], tokens).to(device)
        with backend(variant):
            out = model(inputs_embeds=inputs, use_cache=False, **given).last_hidden_state
            # Checkpointed layers run forward again inside.
            out.backward(gradient)

    first = seconds(step, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    samples = [seconds(step, device) for _ in range(preset["steps"])]
    assert inputs.grad is not None and bool(inputs.grad.isfinite().all())
    peak = {} if device == "cpu" else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"step_s": statistics.median(samples), "range_s": [min(samples), max(samples)], "first_s": first, **peak}


def segments(variant: Variant, tokens: int) -> list[dict[str, Any]]:
    """A row of equally long documents, behind the anchor token where there is one."""
    first = int(variant.policy == "anchor")
    length, rest = divmod(tokens - first, variant.documents)
    lengths = [length + (n < rest) for n in range(variant.documents)]
    starts = [first + sum(lengths[:n]) for n in range(variant.documents)]
    return [
        {"doc_id": str(n), "row_start": start, "num_tokens": num_tokens}
        for n, (start, num_tokens) in enumerate(zip(starts, lengths, strict=True))
    ]


def backend(variant: Variant) -> Any:
    """Holds torch's attention to the variant's backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, variant.backend)) if variant.backend else nullcontext()


def register_without_attention() -> None:
    """Make `no_attention` known to transformers: the sum of queries, keys and values, so that all have gradients."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(WITHOUT_ATTENTION, add_up)
    AttentionMaskInterface.register(WITHOUT_ATTENTION, lambda **_: None)


def add_up(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """[B, H, L, D] queries and [B, G, L, D] keys and values in, [B, L, H, D] out."""
    group = query.shape[1] // key.shape[1]
    out = query.unflatten(1, (-1, group)) + (key + value).unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def seconds(call: Callable[[], None], device: str) -> float:
    """Of one call, to its end on the device."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def compare(steps: list[dict[str, Any]]) -> None:
    """Fill in what compares variants with the fastest full attention, and with none."""
    done = [row for row in steps if "step_s" in row]
    full = min((row["step_s"] for row in done if row["is_full"]), default=None)
    rest = next((row["step_s"] for row in done if row["name"] == "no attention"), None)
    for row in done:
        if full is not None:
            row["of_full"] = row["step_s"] / full
        if rest is not None:
            row["attention_share"] = 1 - rest / row["step_s"]


def table(steps: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'attention':<14} {'step s':>8} {'of full':>8} {'share':>7} {'GiB':>7} {'first s':>8}"]
    for row in steps:
        if "failed" in row:
            lines.append(f"{row['name']:<14} {row['failed']}")
            continue
        numbers = (row.get(name, float("nan")) for name in ("step_s", "of_full", "attention_share", "peak_gib"))
        step, of_full, share, peak = numbers
        lines.append(f"{row['name']:<14} {step:8.3f} {of_full:8.3f} {share:7.3f} {peak:7.1f} {row['first_s']:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
