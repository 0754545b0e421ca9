"""The whole chain on a laptop: real text in, a measurably longer-context model out.

    ropewalk run quickstart                                   the standard library's sources, a model from scratch
    ropewalk run quickstart --param corpus=~/notes            your own folder of texts (--param pattern='**/*.md')
    ropewalk run quickstart --param checkpoint=path/to/model  extend a model you have; no base model is trained

The base model reads 512 tokens, the extended one 4,096. What makes a half-million-parameter model retrieve at all was
measured: rows that repeat themselves, and a curriculum of windows that begins at 32 tokens, let induction form in a few
hundred steps; with longer rows from the start it did not form at all (pipelines/README.md).
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ropewalk.infra.step import External, Pipeline, Resources, Step
from ropewalk.stages import episodes
from ropewalk.stages.data import encode, ingest, mix, pack, plant, splice, split, utk
from ropewalk.stages.data.retrieval import neighbours
from ropewalk.stages.episodes import EpisodeFormat
from ropewalk.stages.evaluation import evaluate, report
from ropewalk.stages.training import train
from ropewalk.stages.training.model import ModelConfig
from ropewalk.stages.training.rope import RopeConfig

BASE_WINDOW = 512
LONG_WINDOW = 4096


@dataclass(frozen=True)
class Lesson:
    """Rows of one length in the base model's curriculum."""

    row_tokens: int
    num_steps: int
    repeats: float
    """Share of rows that repeat themselves."""
    num_facts_max: int
    question_targets: bool
    """At first: retrieval then forms for every seed. Later they would teach which keys training has, and unseen ones
    would be found less."""


CURRICULUM = (
    Lesson(32, 270, 0.5, 8, question_targets=True),
    Lesson(64, 135, 0.4, 8, question_targets=True),
    Lesson(128, 135, 0.3, 12, question_targets=False),
    Lesson(256, 180, 0.2, 24, question_targets=False),
    Lesson(BASE_WINDOW, 180, 0.1, 32, question_targets=False),
)
BATCH_TOKENS = 8192
EXTEND_STEPS = 100
KNOTS = utk.UtkConfig(row_tokens=LONG_WINDOW, num_rows=2 * EXTEND_STEPS)

IN_WORDS = EpisodeFormat(
    fact="\nThe pass key for{key} is{value}.\n", question="\nThe pass key for{key} is", draw_from="words"
)
"""Episodes for a model that was not trained on markers."""

# A stage that only waits for its ranks holds no core itself.
WAITS_FOR_WORKERS = Resources(num_cpus=0)


def pipeline(*, corpus: Path | None = None, pattern: str = "**/*.py", checkpoint: Path | None = None) -> Pipeline:
    """The quickstart. `corpus`: a folder of text files; `checkpoint`: a Hugging Face model folder to extend."""
    ingested = _ingest(corpus, pattern)
    markers = (*episodes.MARKERS, *utk.added_tokens(KNOTS))
    given = External(str(checkpoint.expanduser())) if checkpoint else None
    style = IN_WORDS if given else EpisodeFormat()
    encoded = Step(
        "encode",
        encode,
        encode.EncodeConfig(vocab_size=None if given else 1024, added_tokens=markers),
        inputs={"documents": ingested, **({"tokenizer": given} if given else {})},
    )
    corpus_tokens = {
        subset: Step(
            f"{subset}-set",
            split,
            split.SplitConfig(subset=subset, heldout_fraction=0.05, min_heldout_tokens=LONG_WINDOW),
            inputs={"tokens": encoded},
        )
        for subset in ("train", "heldout")
    }
    base_steps = [] if given else _base(corpus_tokens["train"], encoded)
    base = given or base_steps[-1]
    synthesis = _synthesis(ingested, encoded, corpus_tokens["train"], style)
    extended = Step(
        "extend",
        train,
        train.TrainConfig(
            rope=RopeConfig(method="yarn"),
            phases=(train.Phase(rows="rows", num_steps=EXTEND_STEPS),),
            batch_tokens=2 * LONG_WINDOW,
            learning_rate=1e-3,
            warmup_steps=10,
            weight_decay=0.01,
            inserted_loss_weight=1.0,
            zero_stage=1,
            world_size=2,
            checkpoint_every_steps=25,
        ),
        inputs={"checkpoint": base, "tokenizer": encoded, "rows": synthesis[-1]},
        resources=WAITS_FOR_WORKERS,
    )
    evaluated = Step(
        "evaluate",
        evaluate,
        evaluate.EvaluateConfig(episode=style),
        inputs={"heldout": corpus_tokens["heldout"], "base": base, "extended": extended},
        resources=WAITS_FOR_WORKERS,
    )
    reported = Step(
        "report",
        report,
        report.ReportConfig(),
        inputs={"evaluation": evaluated, "synthesise": synthesis[-1], "base": base, "extended": extended},
    )
    steps = (ingested, encoded, *corpus_tokens.values(), *base_steps, *synthesis, extended, evaluated, reported)
    return Pipeline("quickstart", steps)


def _ingest(corpus: Path | None, pattern: str) -> Step:
    name = "corpus" if corpus else "stdlib"
    folder = str(corpus.expanduser()) if corpus else sysconfig.get_paths()["stdlib"]
    exclude = () if corpus else ("site-packages/**", "test/**/bad*", "**/__pycache__/**")
    source = ingest.SourceConfig(name=name, format="text", include=(pattern,), exclude=exclude)
    files = External(folder, include=source.include, exclude=source.exclude)
    # Shards of moderate size: `encode` works on several at once.
    return Step("ingest", ingest, ingest.IngestConfig(sources=(source,), shard_bytes=2**22), inputs={name: files})


def _base(tokens: Step, encoded: Step) -> list[Step]:
    """A small Llama trained from scratch on windows that grow; the last step is the model."""
    lessons = {
        f"rows-{lesson.row_tokens}": Step(
            f"lesson-{lesson.row_tokens}",
            plant,
            plant.PlantConfig(
                row_tokens=lesson.row_tokens,
                num_rows=lesson.num_steps * BATCH_TOKENS // lesson.row_tokens,
                episode_fraction=0.3,
                repeat_fraction=lesson.repeats,
                num_facts_max=lesson.num_facts_max,
                enable_fewer_facts=True,
                enable_question_targets=lesson.question_targets,
                seed=lesson.row_tokens,
            ),
            inputs={"tokens": tokens, "tokenizer": encoded},
        )
        for lesson in CURRICULUM
    }
    base = Step(
        "base",
        train,
        train.TrainConfig(
            model=ModelConfig(hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=4, intermediate_size=320),
            phases=tuple(train.Phase(rows=f"rows-{each.row_tokens}", num_steps=each.num_steps) for each in CURRICULUM),
            batch_tokens=BATCH_TOKENS,
            learning_rate=3e-3,
            warmup_steps=100,
            weight_decay=0.01,
            inserted_loss_weight=1.0,
            zero_stage=1,
            world_size=2,
        ),
        inputs={"tokenizer": encoded, **lessons},
        resources=WAITS_FOR_WORKERS,
    )
    return [*lessons.values(), base]


def _synthesis(ingested: Step, encoded: Step, tokens: Step, style: EpisodeFormat) -> list[Step]:
    """Long rows four ways, and last their mix."""
    num_rows = EXTEND_STEPS * 2
    near = Step(
        "neighbours",
        neighbours,
        neighbours.NeighboursConfig(retriever="bm25"),
        inputs={"documents": ingested},
    )
    spliced = Step(
        "splice",
        splice,
        splice.SpliceConfig(row_tokens=LONG_WINDOW, num_rows=num_rows),
        inputs={"tokens": tokens, "neighbours": near},
    )
    knotted = Step("knots", utk, KNOTS, inputs={"tokens": tokens})
    packed = Step("pack", pack, pack.PackConfig(row_tokens=LONG_WINDOW, num_rows=num_rows), inputs={"tokens": tokens})
    planted = Step(
        "plant",
        plant,
        plant.PlantConfig(
            row_tokens=LONG_WINDOW,
            num_rows=num_rows,
            episode_fraction=1.0,
            repeat_fraction=0.0,
            num_facts_min=16,
            num_facts_max=64,
            enable_fewer_facts=True,
            episode=style,
            enable_question_targets=False,
            seed=LONG_WINDOW,
        ),
        inputs={"tokens": tokens, "tokenizer": encoded},
    )
    mixed = Step(
        "synthesise",
        mix,
        mix.MixConfig(fractions={"splice": 0.3, "knots": 0.15, "pack": 0.15, "plant": 0.4}, num_rows=num_rows),
        inputs={"splice": spliced, "knots": knotted, "pack": packed, "plant": planted},
    )
    return [near, spliced, knotted, packed, planted, mixed]
