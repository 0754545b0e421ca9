"""How fast the data stages are on this machine, and how much memory they take: tables, and one JSON file.

    python tests/benchmarks/data_speed.py --output measurements.json
    python tests/benchmarks/data_speed.py --only memory

Parts: encode (the stage's worker beside the tokenizer library alone, one thread), chain (Documents on disk to rows on
disk beside its slowest part), workers (two Ray workers beside one), memory (peak of each stage for one corpus and for
ten times it), shuffles (what touches every token once more). The packers themselves: packing_speed.py and
packing_quality.py; other tools: data_peers.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import data_corpora
import data_memory
from measurements import write_measurements
from timings import Sample, progress, show, summary, timed_call

from ropewalk.infra.on_ray.map import OrderedMap
from ropewalk.infra.on_ray.shipping import Shipped
from ropewalk.infra.step import Resources
from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data import encode, pack
from ropewalk.stages.data.packing.gather import gather_tokens
from ropewalk.stages.data.vocabulary import text_encoder
from ropewalk.stages.schema import read_artifact

PACKAGES = ("ropewalk", "tokenizers", "pyarrow", "numpy", "numba", "ray")
ROW_TOKENS = 32_768


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=sorted(PARTS), metavar="PART")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    asked = parser.parse_args()
    numbers = {}
    with tempfile.TemporaryDirectory(prefix="ropewalk-benchmark-") as name:
        for part in asked.only:
            folder = Path(name) / part
            folder.mkdir()
            numbers[part] = found = PARTS[part](folder, asked.repetitions)
            show(f"{part}, seconds and ratios", found)
            if asked.output:
                write_measurements(asked.output, numbers, PACKAGES)


def measure_encode(folder: Path, repetitions: int) -> dict[str, Any]:
    """Throughput of the stage's shard encoder, Parquet in and out, as a share of `encode_batch_fast` alone."""
    tokenizer = (data_corpora.write_tokenizer(folder / "tokenizer") / "tokenizer.json").read_text()
    num_bytes = data_corpora.write_documents(folder / "documents")
    texts, library = data_corpora.library_texts(), text_encoder(tokenizer)
    encoder = encode.ShardEncoder(tokenizer)
    shards = list(enumerate(sorted((folder / "documents").glob("*.parquet"))))

    def alone() -> None:
        for batch in _batches(texts):
            library.encode_batch_fast(batch, add_special_tokens=False)

    def staged() -> None:
        for shard in shards:
            encoder(shard, folder / "tokens")

    pairs = _in_turns(alone, staged, repetitions)
    progress(f"encode: {num_bytes / statistics.median(ours.cpu for _, ours in pairs) / 1e6:.1f} MB/s a core")
    return {
        "tokenizer library alone": summary([theirs for theirs, _ in pairs]),
        "encode stage, one worker": summary([ours for _, ours in pairs]),
        "library's time / stage's time": summary(
            [Sample(theirs.wall / ours.wall, theirs.cpu / ours.cpu) for theirs, ours in pairs], 0.9
        ),
    }


def _batches(texts: tuple[str, ...]) -> Iterator[list[str]]:
    """About a MiB at a time, as the stage does."""
    batch: list[str] = []
    filled = 0
    for text in texts:
        batch.append(text)
        filled += len(text)
        if filled >= 2**20:
            yield batch
            batch, filled = [], 0
    yield batch


def _in_turns(one: Callable[[], Any], other: Callable[[], Any], repetitions: int) -> list[tuple[Sample, Sample]]:
    """Both measured `repetitions` times, in turns, after one that fills the caches."""
    pairs = [(timed_call(one), timed_call(other)) for _ in range(repetitions + 1)]
    return pairs[1:]


def run_stage(stage: Any, config: Any, inputs: dict[str, Path], folder: Path, context: Any = None) -> Path:
    """Run a stage into a new folder; returns its data."""
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    stage.run(config, inputs, output, context or LocalContext(folder / "work"))
    return output.data


def measure_chain(folder: Path, repetitions: int) -> dict[str, Any]:
    """Documents to rows, through encode and pack, beside the slower of the two."""
    tokenizer = data_corpora.write_tokenizer(folder / "tokenizer")
    data_corpora.write_documents(folder / "documents")
    times: dict[str, list[Sample]] = {"encode": [], "pack": []}
    for number in range(repetitions + 1):
        here = folder / str(number)
        inputs = {"documents": folder / "documents", "tokenizer": tokenizer}
        sample = {
            "encode": timed_call(
                lambda here=here, inputs=inputs: run_stage(encode, encode.EncodeConfig(), inputs, here / "encode")
            ),
            "pack": timed_call(
                lambda here=here: run_stage(
                    pack,
                    pack.PackConfig(row_tokens=ROW_TOKENS),
                    {"tokens": here / "encode" / "data"},
                    here / "pack",
                )
            ),
        }
        for name in times if number else ():
            times[name].append(sample[name])
    whole = [Sample(a.wall + b.wall, a.cpu + b.cpu) for a, b in zip(*times.values(), strict=True)]
    slowest = max(times.values(), key=lambda samples: statistics.median(each.wall for each in samples))
    ratios = [Sample(part.wall / all_.wall, part.cpu / all_.cpu) for part, all_ in zip(slowest, whole, strict=True)]
    tokens = read_artifact(folder / "1" / "encode" / "data", "tokens").counts["num_tokens"]
    progress(f"chain: {tokens} tokens")
    return {
        **{name: summary(samples) for name, samples in times.items()},
        "documents to rows": summary(whole),
        "slowest part's time / whole time": summary(ratios, 0.7),
    }


class RayMap(LocalContext):
    """`map` on Ray workers of one core each; the rest here."""

    def map(self, function: Any, items: Any, *, resources: Any = None) -> Iterator[Any]:
        """See `Context.map`."""
        shipped = Shipped.pack((str(Path(__file__).parent),), function)
        return OrderedMap(shipped, Resources(num_cpus=1), lambda event: None, lambda: False).results(items)


def measure_workers(folder: Path, repetitions: int) -> dict[str, Any]:
    """The encode and the pack stage with one and with two Ray workers, from start to artifact."""
    import ray

    tokenizer = data_corpora.write_tokenizer(folder / "tokenizer")
    data_corpora.write_documents(folder / "documents", copies=4)
    data_corpora.write_tokens(folder / "tokens", 60_000)
    inputs = {"documents": folder / "documents", "tokenizer": tokenizer}
    jobs = {
        "encode": (encode, encode.EncodeConfig(), inputs),
        "pack": (pack, pack.PackConfig(row_tokens=ROW_TOKENS, group_tokens=2**22), {"tokens": folder / "tokens"}),
    }
    times: dict[tuple[str, int], list[Sample]] = {(name, n): [] for name in jobs for n in (1, 2)}
    for number in range(repetitions):
        for workers in (1, 2):
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
            for name, (stage, config, slots) in jobs.items():
                here = folder / f"{name}-{number}-{workers}"
                context = RayMap(here / "work")
                times[name, workers].append(
                    timed_call(lambda a=stage, b=config, c=slots, d=here, e=context: run_stage(a, b, c, d, e))
                )
            ray.shutdown()
    found = {f"{name}, {n} worker{'s' * (n > 1)}": summary(samples) for (name, n), samples in times.items()}
    for name in jobs:
        pairs = zip(times[name, 1], times[name, 2], strict=True)
        ratios = [Sample(one.wall / two.wall, two.cpu) for one, two in pairs]
        found[f"{name}, one worker's time / two's"] = summary(ratios, 1.7)
    return found


def measure_shuffles(folder: Path, repetitions: int) -> dict[str, Any]:
    """What touches every token once more: tokens go to their clusters, finished rows to their places."""
    tokens = data_corpora.write_tokens(folder / "tokens", 60_000)
    clusters = data_corpora.write_clusters(folder / "neighbours", 60_000, 16)
    times: dict[str, list[Sample]] = {"gather tokens by cluster": [], "pack, shuffle and write rows": []}
    for number in range(repetitions):
        here = folder / str(number)
        (here / "work").mkdir(parents=True)
        context = LocalContext(here / "work")

        def gather(context: LocalContext = context) -> None:
            found = gather_tokens(context, folder / "tokens", folder / "neighbours", data_corpora.INFO)
            for cluster, doc_ids in enumerate(clusters):
                found.corpus(cluster, doc_ids)

        config = pack.PackConfig(row_tokens=ROW_TOKENS)
        samples = (
            timed_call(gather),
            timed_call(
                lambda here=here, config=config: run_stage(pack, config, {"tokens": folder / "tokens"}, here / "p")
            ),
        )
        for name, sample in zip(times, samples, strict=True):
            times[name].append(sample)
    found = {name: summary(samples) for name, samples in times.items()}
    rates = {name: tokens / statistics.median(each.cpu for each in samples) for name, samples in times.items()}
    progress(", ".join(f"{name}: {rate / 1e6:.0f}M tokens/s a core" for name, rate in rates.items()))
    return found | {"tokens": summary([Sample(tokens, tokens)])}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "encode": measure_encode,
    "chain": measure_chain,
    "workers": measure_workers,
    "memory": data_memory.measure,
    "shuffles": measure_shuffles,
}


if __name__ == "__main__":
    main()
