"""How fast attention is on this machine's GPU, and other libraries beside it in the same run: a table, and a JSON file.

    python tests/benchmarks/kernels_speed.py --preset core --output kernels.json
    python tests/benchmarks/kernels_speed.py --preset full --lengths 131072 --patterns anchor document
    python tests/benchmarks/kernels_speed.py --preset tiny --device cpu

Needs torch and, on a GPU, triton; peers are measured where they are installed. core is meant for 8 minutes of an H200:
it stops there (--minutes), and names what it left out. The file is written anew after every measurement.

Times are medians. TFLOP/s count visible pairs alone: 4 D for each pair forward, 10 D backward. eta is the time of dense
causal attention, by the fastest that could do it, times the density, over the time. own_eta compares with our own dense
time. plan_share is the time to build plan and tiles over that of one attention, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels_in_place  # noqa: F401  # isort: skip  Makes `ropewalk.kernels` importable where it is not installed.
import kernels_patterns
import kernels_peers
from kernels_patterns import Case, Shape
from measurements import commit, machine
from numerics import plain_attention

from ropewalk.kernels.attention import AttentionPlan, sparse_attention
from ropewalk.kernels.attention.on_triton.sizes import choose_sizes

PATTERNS = tuple(kernels_patterns.PATTERNS)
GPU_PEERS = [name for name in kernels_peers.PEERS if name != "sdpa"]
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"lengths": [256, 512], "heads": (4, 2, 64), "peers": ["sdpa"], "minutes": 1.0, "clock_ms": 5},
    "core": {
        "lengths": [65536, 131072, 8192],
        "heads": (32, 8, 128),
        "peers": GPU_PEERS,
        "minutes": 7.0,
        "clock_ms": 60,
    },
    "full": {
        "lengths": [8192, 16384, 32768, 65536, 131072, 262144],
        "heads": (32, 8, 128),
        "peers": GPU_PEERS,
        "minutes": 600.0,
        "clock_ms": 200,
    },
}
FLEX_OF_CORE = (65536, ("all", "16 documents", "window 4096, 4 sinks"))
"""Length and settings: FlexAttention compiles for half a minute, anew for each."""
ERROR_TOKENS = 1024
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "fla-core", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="core")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens, in the order to measure")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS, metavar="PATTERN")
    parser.add_argument("--peers", nargs="*", choices=kernels_peers.PEERS, metavar="PEER")
    parser.add_argument("--implementations", nargs="+", help="ours, by name; default what the device is for")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    asked = parser.parse_args()
    preset = PRESETS[asked.preset] | {
        name: value for name in ("lengths", "peers", "minutes") if (value := getattr(asked, name)) is not None
    }
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --preset tiny --device cpu tries the script out")
    on_gpu = asked.device != "cpu"
    shape = Shape(*preset["heads"], torch.bfloat16 if on_gpu else torch.float32, asked.device)
    ours = asked.implementations or (["triton"] if on_gpu else ["tiled"])
    until = time.monotonic() + 60 * preset["minutes"]
    report = Report(asked.output, asked.preset, shape)
    measure_errors(report, shape, list(asked.patterns), ours)
    measure_all(report, shape, preset, list(asked.patterns), ours, asked.preset, until)
    report.finish()


class Report:
    """The numbers so far, in the file and on the screen."""

    def __init__(self, path: Path | None, preset: str, shape: Shape) -> None:
        self.path = path
        self.document: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": " ".join(["python", *sys.argv]),
            "commit": _commit(),
            "machine": machine() | {"gpu": _gpu(shape.device)},
            "versions": {"python": platform.python_version(), **_versions()},
            "preset": preset,
            "shape": {
                "num_heads": shape.num_heads,
                "num_kv_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
                "dtype": str(shape.dtype),
            },
            "errors": [],
            "times": [],
            "break_even_density": {},
            "left_out": [],
        }

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Note a measurement, show it, and write the file."""
        self.document[part].append(row)
        print(" ".join(f"{name}={_shown(value)}" for name, value in row.items()), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write all so far."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Work out what compares measurements, write, and print the table."""
        times = self.document["times"]
        for tokens in sorted({row["tokens"] for row in times}):
            rows = [row for row in times if row["tokens"] == tokens and "total_ms" in row]
            self._compare(tokens, rows)
        self.write()
        print(table(times))
        print("break-even density:", self.document["break_even_density"] or "not measured")
        for left_out in self.document["left_out"]:
            print("left out:", left_out)

    def _compare(self, tokens: int, rows: list[dict[str, Any]]) -> None:
        dense = [row for row in rows if row["pattern"] == "causal" and "density" in row]
        peers = [row for row in dense if not row["is_ours"]] or dense
        for row in rows:
            if "density" not in row or not peers:
                continue
            for part in ("forward", "backward", "total"):
                name = f"{part}_ms"
                row[f"{part}_eta"] = min(peer[name] for peer in peers) * row["density"] / row[name]
                own = [other[name] for other in dense if other["implementation"] == row["implementation"]]
                if own:
                    row[f"{part}_own_eta"] = own[0] * row["density"] / row[name]
        for name in sorted({row["implementation"] for row in rows if row["is_ours"]}):
            lists = [r for r in rows if r["implementation"] == name and r["pattern"] == "block_lists"]
            if len(lists) > 1 and peers:
                found = break_even([(r["density"], r["total_ms"]) for r in lists], min(p["total_ms"] for p in peers))
                self.document["break_even_density"][f"{name} at {tokens}"] = found


def break_even(points: list[tuple[float, float]], dense_ms: float) -> float | None:
    """The density at which a straight line through (density, time) meets the dense time; None if there is none."""
    mean_density, mean_ms = (statistics.fmean(values) for values in zip(*points, strict=True))
    spread = sum((density - mean_density) ** 2 for density, _ in points)
    slope = sum((density - mean_density) * (ms - mean_ms) for density, ms in points) / spread
    found = (dense_ms - mean_ms) / slope + mean_density if slope > 0 else 0.0
    return found if found > 0 else None


def measure_all(
    report: Report, shape: Shape, preset: dict[str, Any], patterns: list[str], ours: list[str], name: str, until: float
) -> None:
    """Times of every pattern at every length: dense first, since all are compared with it."""
    for tokens in preset["lengths"]:
        for case in kernels_patterns.cases(patterns, tokens, shape):
            if time.monotonic() > until:
                report.document["left_out"].append(f"{case.pattern}, {case.setting}, {tokens} tokens: out of time")
                continue
            has_flex = name != "core" or (tokens == FLEX_OF_CORE[0] and case.setting in FLEX_OF_CORE[1])
            peers = [peer for peer in preset["peers"] if peer != "flex" or has_flex]
            measure_case(report, case, shape, ours, peers, preset["clock_ms"])


def measure_case(report: Report, case: Case, shape: Shape, ours: list[str], peers: list[str], clock_ms: float) -> None:
    """Times of one pattern at one length, by all that can do it; what fails is noted with its message."""
    q, k, v, dout = kernels_patterns.inputs(case.tokens, shape)
    plan = case.build()
    pairs = int(plan.num_visible().sum()) * shape.num_heads // plan.plan_heads
    head = {"pattern": case.pattern, "setting": case.setting, "tokens": case.tokens}
    density = plan.density()
    for name in [*ours, *peers]:
        is_ours = name in ours
        row = {**head, "implementation": name, "is_ours": is_ours}
        try:
            if is_ours:
                attend = _our_attention(name, plan)
                call = partial(attend, q, k, v)
            else:
                began = time.perf_counter()
                call = kernels_peers.prepare(name, case, shape, q, k, v)
                if call is None:
                    continue
                row["prepare_ms"] = 1000 * (time.perf_counter() - began)
            row |= timed(call, (q, k, v), dout, shape, clock_ms)
        except ImportError:
            continue
        except Exception as error:  # noqa: BLE001  What fails must not stop the rest.
            report.add("times", row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        if name in kernels_peers.OWN_PATTERN:
            row["setting"] = kernels_peers.OWN_PATTERN[name]
        else:
            row["density"] = density
            row["forward_tflops"] = 4 * shape.head_dim * pairs / row["forward_ms"] / 1e9
            row["backward_tflops"] = 10 * shape.head_dim * pairs / row["backward_ms"] / 1e9
        if is_ours:
            row["plan_ms"] = plan_ms(case, shape, name)
            row["plan_share"] = row["plan_ms"] / row["total_ms"]
        report.add("times", row)


def timed(
    call: Callable[[], Tensor], leaves: tuple[Tensor, ...], dout: Tensor, shape: Shape, clock_ms: float
) -> dict[str, float]:
    """Median times of forward and backward, and the memory that both together take beyond the inputs."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    row: dict[str, float] = {}
    if shape.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(call(), leaves, dout)  # Compiles, too.
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(call(), leaves, dout)
        torch.cuda.synchronize()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row["forward_ms"] = median_ms(forward, shape.device, clock_ms)
    out = call()
    row["backward_ms"] = median_ms(
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), shape.device, clock_ms
    )
    row["total_ms"] = row["forward_ms"] + row["backward_ms"]
    return row


def median_ms(call: Callable[[], Any], device: str, clock_ms: float) -> float:
    """The median over as many calls as fit into `clock_ms`, three at least."""
    if device != "cpu":
        from triton.testing import do_bench

        found: Any = do_bench(call, warmup=clock_ms / 4, rep=clock_ms, return_mode="median")
        return found
    samples: list[float] = []
    while len(samples) < 3 or (sum(samples) < clock_ms and len(samples) < 100):
        began = time.perf_counter()
        call()
        samples.append(1000 * (time.perf_counter() - began))
    return statistics.median(samples)


def plan_ms(case: Case, shape: Shape, implementation: str) -> float:
    """Median time to build the plan and the tiles of all kernels. Block lists are given."""
    samples = []
    for _ in range(3):
        _synchronize(shape.device)
        began = time.perf_counter()
        plan = case.build()
        for query_tile, key_tile in _tile_sizes(plan, shape, implementation):
            plan.tiles(query_tile, key_tile)
        _synchronize(shape.device)
        samples.append(1000 * (time.perf_counter() - began))
    return statistics.median(samples)


def _tile_sizes(plan: AttentionPlan, shape: Shape, implementation: str) -> set[tuple[int, int]]:
    blocks = None if plan.blocks is None else plan.blocks.block_tokens
    if implementation != "triton":
        return {(min(64, blocks or 64),) * 2}
    sizes = choose_sizes(shape.head_dim, shape.dtype, blocks)
    return {(size.M, size.N) for size in (sizes.forward, sizes.keys, sizes.queries)}


def measure_errors(report: Report, shape: Shape, patterns: list[str], ours: list[str]) -> None:
    """Largest errors against fp64, relative to the largest value; beside them those of plain torch in this dtype."""
    for case in kernels_patterns.cases(patterns, ERROR_TOKENS if shape.device != "cpu" else 256, shape):
        plan = case.build()
        given = kernels_patterns.inputs(case.tokens, shape)
        exact = _results(_our_attention("reference", plan), *given, torch.float64)
        visible = plan.visible()
        plain = _results(_plain_attention(visible), *given, shape.dtype)
        row: dict[str, Any] = {"pattern": case.pattern, "setting": case.setting, "plain": _errors(plain, exact)}
        for name in ours:
            try:
                row[name] = _errors(_results(_our_attention(name, plan), *given, shape.dtype), exact)
            except Exception as error:  # noqa: BLE001  What fails must not stop the rest.
                row[name] = f"{type(error).__name__}: {str(error)[:300]}"
        report.add("errors", row)


def _our_attention(name: Any, plan: AttentionPlan) -> Callable[..., Tensor]:
    return lambda q, k, v: sparse_attention(q, k, v, plan, implementation=name)[0]


def _plain_attention(visible: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, v: plain_attention(q, k, v, visible)[0]


def _results(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """[out, dq, dk, dv]."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def _errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    names = ("out", "dq", "dk", "dv")
    return {
        name: float((x.double() - right).abs().max() / right.abs().max())
        for name, x, right in zip(names, found, exact, strict=True)
    }


def table(times: list[dict[str, Any]]) -> str:
    """For people; eta is that of forward and backward together."""
    columns = ("tokens", "pattern", "setting", "implementation", "density", "forward_ms", "backward_ms")
    columns += ("forward_tflops", "backward_tflops", "total_eta", "total_own_eta", "plan_share", "peak_mib")
    lines = [
        columns,
        *(
            tuple(_shown(row.get(name, row.get("failed", "") if name == "forward_ms" else ""))[:40] for name in columns)
            for row in times
        ),
    ]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _commit() -> str:
    try:
        return commit()
    except OSError:
        return "unknown"  # No git here.


def _gpu(device: str) -> dict[str, Any] | None:
    if device == "cpu":
        return None
    cudnn = torch.backends.cudnn.version()
    return {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": cudnn}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
