"""Finding pipelines, and what their parameters change."""

import pytest

from ropewalk.infra.step import UserError
from ropewalk.pipelines.load import load_pipeline, pipeline_names

NAMED_STEPS = {"ingest", "encode", "base", "synthesise", "extend", "evaluate", "report"}


def names(*parameters):
    return [step.name for step in load_pipeline("quickstart", parameters).pipeline]


def test_the_package_knows_its_pipelines_by_name():
    assert pipeline_names() == ["quickstart"]
    assert set(names()) >= NAMED_STEPS


def test_with_a_checkpoint_of_the_users_own_the_base_model_falls_away(tmp_path):
    given = names(f"checkpoint={tmp_path}")
    assert "base" not in given and not [name for name in given if name.startswith("lesson")]
    assert set(given) >= NAMED_STEPS - {"base"}
    pipeline = load_pipeline("quickstart", (f"checkpoint={tmp_path}",)).pipeline
    for step, slot in (("encode", "tokenizer"), ("extend", "checkpoint"), ("evaluate", "base"), ("report", "base")):
        assert pipeline[step].externals[slot].path == str(tmp_path)
    assert "<|key|>" not in pipeline["evaluate"].config.model_dump_json().replace("added_tokens", "")


def test_a_corpus_of_the_users_own_is_read_by_its_pattern(tmp_path):
    pipeline = load_pipeline("quickstart", (f"corpus={tmp_path}", "pattern=**/*.md")).pipeline
    external = pipeline["ingest"].externals["corpus"]
    assert external.path == str(tmp_path) and external.include == ("**/*.md",)
    assert pipeline["ingest"].config.model_dump()["sources"][0]["include"] == ("**/*.md",)


def test_a_file_without_a_pipeline_function_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"defines no pipeline\(\) function"):
        load_pipeline(str(tmp_path / "empty.py"))
    (tmp_path / "wrong.py").write_text("def pipeline():\n    return 3\n")
    with pytest.raises(UserError, match=r"returned a int, not a Pipeline"):
        load_pipeline(str(tmp_path / "wrong.py"))
