"""How fast attention is on this machine's GPU, and other libraries beside it in the same run: a table, and a JSON file.

    python tests/benchmarks/kernels_speed.py --preset core --output kernels.json
    python tests/benchmarks/kernels_speed.py --preset full --lengths 131072 --patterns anchor document
    python tests/benchmarks/kernels_speed.py --preset tiny --device cpu

Needs torch and, on a GPU, triton; peers are measured where they are installed. core is meant for 8 minutes of an H200:
the most wanted numbers first, it stops in time (--minutes), and names what it left out. The file is written anew after
every measurement; --resume goes on where it ends. A measurement that breaks the GPU's context is noted as failed, and
the rest goes on in a new process.

Times are medians of single calls with a cold L2 cache, gradients wanted. TFLOP/s count visible pairs alone: 4 D for
each pair forward, 10 D backward. eta is the time of dense causal attention, by the fastest that could do it, times the
density, over the time. own_eta compares with our own dense time. plan_share is the time to build plan and tiles over
that of one attention, forward and backward. first_call_s is what the first forward and backward take, compilers
included; host_ms what it takes to launch both, waiting for the GPU included, so that it should not grow with tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

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

PATTERNS = tuple(kernels_patterns.PATTERNS)
GPU_PEERS = [name for name in kernels_peers.PEERS if name != "sdpa"]
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"lengths": [256, 512], "heads": (4, 2, 64), "peers": ["sdpa"], "minutes": 1.0, "clock_ms": 5},
    "core": {
        "lengths": [65536, 131072, 8192],
        "heads": (32, 8, 128),
        "peers": GPU_PEERS,
        "minutes": 7.0,
        "clock_ms": 250,
    },
    "full": {
        "lengths": [8192, 16384, 32768, 65536, 131072, 262144],
        "heads": (32, 8, 128),
        "peers": GPU_PEERS,
        "minutes": 600.0,
        "clock_ms": 500,
    },
}
CORE_ORDER = (
    ("causal", "all"),
    ("anchor", "16 documents"),
    ("document", "16 documents"),
    ("block_lists", "10% listed"),
    ("block_lists", "50% listed"),
    ("block_lists", "75% listed"),
    ("block_lists", "25% listed"),
)
"""Measured first at each length."""
FLEX_OF_CORE = (65536, ("16 documents", "all", "window 4096, 4 sinks"))
"""Length and settings: FlexAttention compiles for half a minute, anew for each. All but the first setting come last."""
ERROR_TOKENS = 2048
"""So many that Triton compiles for errors what it compiles for times: a multiple of 16 tiles."""
L2_BYTES = 256 * 2**20
"""Written between timed calls: several times what a Hopper's L2 holds."""
FEWEST_CALLS, MOST_CALLS = 3, 50
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "flash-attn-4",
    "fla-core",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


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
    parser.add_argument("--resume", action="store_true", help="keep what --output holds, and measure the rest")
    asked = parser.parse_args()
    preset = PRESETS[asked.preset] | {
        name: value for name in ("lengths", "peers", "minutes") if (value := getattr(asked, name)) is not None
    }
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --preset tiny --device cpu tries the script out")
    on_gpu = asked.device != "cpu"
    num_heads, num_kv_heads, head_dim = preset["heads"]
    shape = Shape(num_heads, num_kv_heads, head_dim, torch.bfloat16 if on_gpu else torch.float32, asked.device)
    ours = asked.implementations or (["triton"] if on_gpu else ["tiled"])
    report = Report(asked.output, asked.preset, shape, time.monotonic() + 60 * preset["minutes"], asked.resume)
    measure_errors(report, shape, list(asked.patterns), ours)
    for job in jobs(preset, list(asked.patterns), ours, shape, is_core=asked.preset == "core"):
        report.attempt("times", job.names(), partial(measure, job, shape, preset["clock_ms"]))
    report.finish()


class Report:
    """The numbers so far, in the file and on the screen."""

    def __init__(self, path: Path | None, preset: str, shape: Shape, until: float, resumes: bool) -> None:
        self.path, self.shape, self.until = path, shape, until
        self.document: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": " ".join(["python", *sys.argv]),
            "commit": commit(),
            "machine": machine() | {"gpu": gpu(shape.device)},
            "versions": {"python": platform.python_version(), **versions()},
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
            "attempted": [],
            "running": None,
        }
        if resumes and path and path.exists():
            self._resume(json.loads(path.read_text(encoding="utf-8")))

    def _resume(self, earlier: dict[str, Any]) -> None:
        for part in ("errors", "times", "attempted"):
            self.document[part] = earlier[part]
        if earlier["running"]:
            died = earlier["running"]
            self.document["attempted"].append(_key(died["part"], died["names"]))
            self.document[died["part"]].append(died["names"] | {"failed": "the process ended in the middle of it"})

    def attempt(self, part: str, names: dict[str, Any], make: Callable[[], dict[str, Any] | None]) -> None:
        """Note what `make` measures under these names, or how it failed; not what is not installed or not possible."""
        key = _key(part, names)
        if key in self.document["attempted"]:
            return
        if time.monotonic() > self.until:
            self.document["left_out"].append(key)
            return
        self.document["running"] = {"part": part, "names": names}
        self.write()
        try:
            found = make()
        except ImportError:
            found = None
        except Exception as error:  # noqa: BLE001  What fails must not stop the rest.
            found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        self.document["attempted"].append(key)
        self.document["running"] = None
        if found is not None:
            row = names | found
            self.document[part].append(row)
            print(" ".join(f"{name}={_shown(value)}" for name, value in row.items()), file=sys.stderr, flush=True)
        self.write()
        if found is not None and "failed" in found and _is_broken(self.shape.device):
            self._start_anew()

    def _start_anew(self) -> None:
        """Go on in a new process: after an illegal access this one's GPU context answers nothing else any more."""
        if self.path is None:
            raise SystemExit("the GPU's context is broken; with --output the rest would go on in a new process")
        minutes = max(0.0, self.until - time.monotonic()) / 60
        # The driver frees the GPU's memory when its files are closed, which a new program alone need not do.
        os.closerange(3, 65536)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--resume", "--minutes", str(minutes)])

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
        for left_out in self.document["left_out"]:
            print("left out, no time:", left_out)
        for row in times:
            if "times_as_fast_as" in row:
                print(
                    row["tokens"], row["pattern"], row["setting"], row["implementation"], "times as fast as:", end=" "
                )
                print(_shown(row["times_as_fast_as"]))
        print("break-even density:", self.document["break_even_density"] or "not measured")

    def _compare(self, tokens: int, rows: list[dict[str, Any]]) -> None:
        dense = [row for row in rows if row["pattern"] == "causal" and "density" in row]
        peers = [row for row in dense if not row["is_ours"]] or dense
        for row in rows:
            if "density" not in row:
                continue
            if row["is_ours"]:
                others = [r for r in rows if _case(r) == _case(row) and not r["is_ours"] and "density" in r]
                faster = {r["implementation"]: r["total_ms"] / row["total_ms"] for r in others}
                best = min((peer["total_ms"] for peer in peers), default=None)
                row["times_as_fast_as"] = faster | ({"dense": best / row["total_ms"]} if best else {})
            for part in ("forward", "backward", "total") if peers else ():
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


@dataclass(frozen=True)
class Job:
    """One pattern at one length, by one implementation."""

    case: Case
    implementation: str
    is_ours: bool

    def names(self) -> dict[str, Any]:
        """What tells its row from others."""
        head = {"pattern": self.case.pattern, "setting": self.case.setting, "tokens": self.case.tokens}
        return head | {"implementation": self.implementation, "is_ours": self.is_ours}


def jobs(preset: dict[str, Any], patterns: list[str], ours: list[str], shape: Shape, *, is_core: bool) -> list[Job]:
    """What to measure, in order: length by length and, in core, the most wanted first and slow compilers last."""
    peers = [name for name in preset["peers"] if name not in ours]
    found = [
        Job(case, name, name in ours)
        for tokens in preset["lengths"]
        for case in kernels_patterns.cases(patterns, tokens, shape)
        for name in [*ours, *peers]
    ]
    if not is_core:
        return found
    return sorted((job for job in found if _is_of_core(job)), key=partial(_rank, preset["lengths"]))


def _is_of_core(job: Job) -> bool:
    length, settings = FLEX_OF_CORE
    return job.is_ours or job.implementation != "flex" or (job.case.tokens == length and job.case.setting in settings)


def _rank(lengths: list[int], job: Job) -> tuple[bool, int, int]:
    place = (job.case.pattern, job.case.setting)
    comes_last = job.implementation == "flex" and job.case.setting != FLEX_OF_CORE[1][0]
    wanted = CORE_ORDER.index(place) if place in CORE_ORDER else len(CORE_ORDER)
    return comes_last, lengths.index(job.case.tokens), wanted


def measure(job: Job, shape: Shape, clock_ms: float) -> dict[str, Any] | None:
    """Times of a job; None if the peer has no such pattern."""
    case, name = job.case, job.implementation
    q, k, v, dout = kernels_patterns.inputs(case.tokens, shape)
    plan = case.build()
    row: dict[str, Any] = {}
    call: Callable[[], Tensor] | None = partial(_our_attention(name, plan), q, k, v)
    if not job.is_ours:
        began = time.perf_counter()
        call = kernels_peers.prepare(name, case, shape, q, k, v)
        row["prepare_ms"] = 1000 * (time.perf_counter() - began)
    if call is None:
        return None
    row |= timed(call, (q, k, v), dout, shape, clock_ms)
    if name in kernels_peers.OWN_PATTERN:
        return row | {"setting": kernels_peers.OWN_PATTERN[name]}
    pairs = int(plan.num_visible().sum()) * shape.num_heads // plan.plan_heads
    row["density"] = plan.density()
    row["forward_tflops"] = 4 * shape.head_dim * pairs / row["forward_ms"] / 1e9
    row["backward_tflops"] = 10 * shape.head_dim * pairs / row["backward_ms"] / 1e9
    if job.is_ours:
        row["plan_ms"] = plan_ms(case, shape, tile_sizes(lambda: torch.autograd.grad(call(), (q, k, v), dout)))
        row["plan_share"] = row["plan_ms"] / row["total_ms"]
    return row


def timed(
    call: Callable[[], Tensor], leaves: tuple[Tensor, ...], dout: Tensor, shape: Shape, clock_ms: float
) -> dict[str, Any]:
    """Median times of forward and backward, and the memory that both together take beyond the inputs."""
    row: dict[str, Any] = {}
    synchronize(shape.device)
    began = time.perf_counter()
    torch.autograd.grad(call(), leaves, dout)
    synchronize(shape.device)
    row["first_call_s"] = time.perf_counter() - began
    if shape.device != "cpu":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(call(), leaves, dout)
        torch.cuda.synchronize()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        began = time.perf_counter()
        torch.autograd.grad(call(), leaves, dout)
        row["host_ms"] = 1000 * (time.perf_counter() - began)
        torch.cuda.synchronize()
    out = call()
    parts: dict[str, Callable[[], Any]] = {
        "forward": call,
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    }
    for part, run in parts.items():
        samples = samples_ms(run, shape.device, clock_ms)
        row[f"{part}_ms"] = statistics.median(samples)
        row[f"{part}_range_ms"] = [min(samples), max(samples)]
    row["total_ms"] = row["forward_ms"] + row["backward_ms"]
    return row


def samples_ms(call: Callable[[], Any], device: str, clock_ms: float) -> list[float]:
    """Times of single calls: as many as fit into `clock_ms`, three at least."""
    if device != "cpu":
        return _gpu_samples_ms(call, device, clock_ms)
    samples: list[float] = []
    while len(samples) < FEWEST_CALLS or (sum(samples) < clock_ms and len(samples) < MOST_CALLS):
        began = time.perf_counter()
        call()
        samples.append(1000 * (time.perf_counter() - began))
    return samples


def _gpu_samples_ms(call: Callable[[], Any], device: str, clock_ms: float) -> list[float]:
    """By events, all queued at once: the time to launch counts only where the GPU waits for it."""
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    def queue(calls: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for begin, end in events:
            cache.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    once = queue(1)[0]
    return queue(min(MOST_CALLS, max(FEWEST_CALLS, int(clock_ms / max(once, 1e-3)))))


def tile_sizes(call: Callable[[], Any]) -> set[tuple[int, int]]:
    """The sizes of tiles that a call asks plans for."""
    tiles = AttentionPlan.tiles
    with mock.patch.object(AttentionPlan, "tiles", autospec=True, side_effect=tiles) as asked:
        call()
    return {(query_tile, key_tile) for _, query_tile, key_tile in (each.args for each in asked.call_args_list)}


def plan_ms(case: Case, shape: Shape, sizes: set[tuple[int, int]]) -> float:
    """Median time to build the plan and its tiles. Block lists are given."""
    samples = []
    for _ in range(4):
        synchronize(shape.device)
        began = time.perf_counter()
        plan = case.build()
        for query_tile, key_tile in sizes:
            plan.tiles(query_tile, key_tile)
        synchronize(shape.device)
        samples.append(1000 * (time.perf_counter() - began))
    return statistics.median(samples[1:])


def measure_errors(report: Report, shape: Shape, patterns: list[str], ours: list[str]) -> None:
    """Largest errors against fp64, relative to the largest value; beside them those of plain torch in this dtype."""
    for case in kernels_patterns.cases(patterns, ERROR_TOKENS if shape.device != "cpu" else 256, shape):
        for name in ["plain", *ours]:
            names = {"pattern": case.pattern, "setting": case.setting, "implementation": name}
            report.attempt("errors", names, partial(errors, case, shape, name))


def errors(case: Case, shape: Shape, name: str) -> dict[str, float]:
    """Of out, dq, dk and dv."""
    plan = case.build()
    given = kernels_patterns.inputs(case.tokens, shape)
    exact = _results(_our_attention("reference", plan), *given, torch.float64)
    attend = _plain_attention(plan.visible()) if name == "plain" else _our_attention(name, plan)
    found = _results(attend, *given, shape.dtype)
    return {
        part: float((x.double() - right).abs().max() / right.abs().max())
        for part, x, right in zip(("out", "dq", "dk", "dv"), found, exact, strict=True)
    }


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


def table(times: list[dict[str, Any]]) -> str:
    """For people; eta is that of forward and backward together."""
    columns = ("tokens", "pattern", "setting", "implementation", "density", "forward_ms", "backward_ms")
    columns += ("forward_tflops", "backward_tflops", "total_eta", "plan_share", "peak_mib")
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


def _key(part: str, names: dict[str, Any]) -> str:
    return ", ".join([part, *(str(value) for name, value in names.items() if name != "is_ours")])


def _case(row: dict[str, Any]) -> tuple[str, str]:
    return row["pattern"], row["setting"]


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if device != "cpu":
        torch.cuda.synchronize()


def _is_broken(device: str) -> bool:
    """Whether the GPU fails at anything now."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def gpu(device: str) -> dict[str, Any] | None:
    """What the GPU is, and the libraries' versions that only it says."""
    if device == "cpu":
        return None
    cudnn = torch.backends.cudnn.version()
    return {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": cudnn}


def versions() -> dict[str, str]:
    """Of the packages that set the speed, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
