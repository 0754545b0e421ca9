"""The report: every number in its main table is in the summary, it stands alone, and equal inputs give equal bytes."""

import base64
import html
import json
import re

import matplotlib
import numpy as np
import pytest

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.evaluation import report
from ropewalk.stages.evaluation.backends import WindowReader
from ropewalk.stages.evaluation.composition import read_composition
from ropewalk.stages.evaluation.evaluate import EvaluateConfig, ask
from ropewalk.stages.evaluation.scoring import losses_schema, samples_schema
from ropewalk.stages.evaluation.summary import summarise
from ropewalk.stages.evaluation.tasks import Task
from ropewalk.stages.schema import Artifact, predictions_schema, write_artifact, write_table

CONFIG = EvaluateConfig(
    tasks=(Task(name="multikey", num_facts=4),), lengths_tokens=(64, 128, 256), depths=(0.1, 0.5, 0.9),
    samples_per_cell=4, loss_tokens=256, loss_bucket_edges=(0, 64, 128, 256), bootstrap_samples=100,
)  # fmt: skip
WINDOWS = {"base": 64, "extended": 256}


def losses_of(model):
    rng = np.random.default_rng(0)
    means = [3.0, 2.5, 4.0] if model == "base" else [3.0, 2.4, 2.1]
    return [
        {
            "doc_id": f"d{doc}",
            "position_start": a,
            "position_end": b,
            "num_tokens": b - a,
            "sum_nll": (b - a) * mean * x,
        }
        for doc, x in enumerate(rng.normal(1, 0.05, size=5))
        for mean, (a, b) in zip(means, [(0, 64), (64, 128), (128, 256)], strict=True)
    ]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, material, info):
    """An evaluation of two perfect readers with windows of 64 and 256 tokens."""
    folder, predictions, losses = tmp_path_factory.mktemp("evaluation"), {}, {}
    for model, window in WINDOWS.items():
        reader = WindowReader(material.writer, info.vocab_size, window_tokens=window)
        results = [ask(CONFIG.tasks[0], length, CONFIG, reader, material) for length in CONFIG.lengths_tokens]
        predictions[model] = [row for result in results for row in result["predictions"]]
        samples = [row for result in results for row in result["samples"]]
        losses[model] = losses_of(model)
        write_table(folder / model, "predictions", predictions_schema(), predictions[model])
        write_table(folder / model, "losses", losses_schema(), losses[model])
    # Held-out text may hold anything.
    samples[-1]["text_before"] = samples[0]["text_before"] = "<script>alert('x')</script>&amp;"
    predictions["extended"][0]["score"] = 0.0
    write_table(folder / "extended", "predictions", predictions_schema(), predictions["extended"])
    write_table(folder, "samples", samples_schema(), samples)
    known = {"weights_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "rope_parameters": {"rope_theta": 1e4}}
    models = {
        name: {**known, "trained_tokens": window, "beyond_trained_window": [n for n in (64, 128, 256) if n > window]}
        for name, window in WINDOWS.items()
    }
    summary = {
        **summarise(predictions, losses, WINDOWS, CONFIG), "models": models, "settings": CONFIG.model_dump(mode="json")
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    counts = {
        "samples": len(samples), "samples_over_several_documents": 0, "heldout_documents": 9,
        "loss_documents_used": 5, "loss_documents_too_short": 3,
    }  # fmt: skip
    write_artifact(folder, Artifact(kind="predictions", tokenizer=info, counts=counts))
    return folder


@pytest.fixture(scope="module")
def mix(tmp_path_factory, info):
    folder = tmp_path_factory.mktemp("mix")
    details = {"tokens_by_slot": {"splice": 700, "utk": 300}, "inserted_fraction": 0.031, "seen": ["a"]}
    write_artifact(folder, Artifact(kind="rows", tokenizer=info, row_tokens=256, counts={"rows": 4}, details=details))
    (folder / "statistics.json").write_text(json.dumps({"tokens_by_source": {f"s{i}": 10 - i for i in range(8)}}))
    return folder


def write_report(folder, inputs):
    for name in ("data", "observed"):
        (folder / name).mkdir()
    report.run(report.ReportConfig(), inputs, Output(folder / "data", folder / "observed"), LocalContext(folder))
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory, evaluation, mix, checkpoints):
    return write_report(tmp_path_factory.mktemp("report"), {"evaluation": evaluation, "synthesise": mix, **checkpoints})


@pytest.fixture(scope="module")
def page(files):
    return files["report.html"].decode()


def cells_of(page):
    """The rows of the main table as lists of the numbers they show."""
    table = re.search(r'<table id="scores".*?</table>', page, re.S).group(0)
    rows = re.findall(r"<tr(?! class=\"group\")[^>]*>(.*?)</tr>", table, re.S)[1:]
    texts = [html.unescape(re.sub(r"<[^>]+>", " ", row)).replace("−", "-") for row in rows]
    return [re.findall(r"[-+]?\d[\d,]*\.?\d*", text) for text in texts]


def test_every_number_in_the_main_table_is_in_the_summary(page, files):
    table = json.loads(files["summary.json"])["table"]
    shown = cells_of(page)
    assert len(shown) == len(table) == 3  # one task: its mean over tasks is not repeated
    for texts, row in zip(shown, table, strict=True):
        numbers = [float(text.replace(",", "")) for text in texts]
        estimates = [row["scores"]["base"], row["scores"]["extended"], row["difference"]]
        expected = [row["length_tokens"]]
        expected += [estimate[name] for estimate in estimates for name in ("mean", "low", "high")]
        expected += [max(row["difference"]["p_value"], 0.001), row["difference"]["num_samples"]]
        assert numbers == pytest.approx(expected, abs=0.00501)
        assert len(numbers) == 12
    assert f"{table[0]['difference']['num_samples']}" == shown[0][-1] == "12"


def test_only_established_differences_are_bold(page, files):
    table = json.loads(files["summary.json"])["table"]
    body = re.search(r'<table id="scores".*?</table>', page, re.S).group(0)
    bold = [bool(kind) for kind in re.findall(r'<tr( class="established")?><th scope="row">', body)]
    assert bold == [row["difference"]["established"] for row in table]
    assert set(bold) == {True, False}


def test_two_runs_give_equal_bytes_whatever_the_users_settings(files, tmp_path, evaluation, mix, checkpoints):
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        again = write_report(tmp_path, {"evaluation": evaluation, "synthesise": mix, **checkpoints})
    assert again.keys() == files.keys()
    assert [name for name in files if files[name] != again[name]] == []


def test_the_page_stands_alone_and_its_pictures_are_the_files_beside_it(page, files):
    assert "<script" not in page and not re.search(r'(src|href|srcset)="(?!data:)', page)
    pictures = [base64.b64decode(uri) for uri in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    beside = [content for name, content in files.items() if name.endswith(".png")]
    assert sorted(pictures) == sorted(beside) and len(beside) == 2 * (1 + 1 + 2 + 1 + 2)
    assert all(b"Software" not in content[:200] for content in beside)


def test_every_picture_is_described_and_every_heading_has_a_scope(page):
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(alts) == page.count("<img ") == 7 and all(len(alt) > 30 for alt in alts)
    assert page.count("<th ") == page.count('scope="')


def test_held_out_text_is_escaped(page):
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;amp;" in page


def test_wrong_answers_are_shown_shortest_first_with_what_was_expected(page, evaluation):
    gallery = page[page.index("got wrong") :]
    assert "1 of 36 wrong" in gallery
    assert "multikey-64-0.1-0" in gallery and "<mark>" in gallery


def test_the_verdict_stands_on_top_and_in_the_summary(page, files):
    verdict = json.loads(files["summary.json"])["verdict"]
    assert verdict["outcome"] == "longer"
    assert page.index(html.escape(verdict["headline"])) < page.index("<h2>")


def test_a_report_needs_only_the_evaluation(tmp_path, evaluation):
    page = write_report(tmp_path, {"evaluation": evaluation})["report.html"].decode()
    assert "<h2>Training</h2>" not in page and "<h2>Scores</h2>" in page


def test_an_input_of_another_kind_is_refused(tmp_path, mix):
    with pytest.raises(ValueError, match="holds rows, not predictions"):
        write_report(tmp_path, {"evaluation": mix})


def test_the_composition_keeps_every_token_and_names_the_largest_parts(mix):
    composition = read_composition(mix)
    assert composition.shares["tokens by slot"] == {"splice": 700, "utk": 300}
    sources = composition.shares["tokens by source"]
    assert list(sources) == ["s0", "s1", "s2", "s3", "s4", "3 others"]
    assert sum(sources.values()) == sum(range(3, 11))
    assert composition.facts == {"inserted": "3.1%", "rows": "4"}
