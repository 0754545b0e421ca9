"""Finding pipelines, what their parameters change, and what is said of files that are none."""

import pytest

from ropewalk.infra.step import UserError
from ropewalk.pipelines.load import load_pipeline, pipeline_names, pipeline_parameters

NAMED_STEPS = {"ingest", "encode", "base", "synthesise", "extend", "evaluate", "report"}


def names(*parameters):
    return [step.name for step in load_pipeline("quickstart", parameters).pipeline]


def test_the_package_knows_its_pipelines_by_name():
    assert pipeline_names() == ["compare_packing", "quickstart"]
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


FILES = {
    "empty": ("x = 1\n", r"empty\.py defines no pipeline\(\) function"),
    "wrong": ("def pipeline():\n    return 3\n", r"wrong\.py: pipeline\(\) returned int, not a Pipeline"),
    "raises": ("\nx = missing\n", r"raises\.py, line 2: the pipeline file cannot be imported: NameError: .*'missing'"),
    "absent": ("import absent_module\n", r"absent\.py, line 1: .* No module named 'absent_module'"),
    "broken": ("def pipeline(:\n", r"broken\.py, line 1: .* SyntaxError"),
    "exits": ("import sys\nsys.exit(3)\n", r"exits\.py, line 2: .* SystemExit: 3"),
    "fails": ("def pipeline():\n    return 1 / 0\n", r"fails\.py, line 2: its pipeline\(\) failed: ZeroDivisionError"),
    "config": (
        "from pydantic import BaseModel\nclass Config(BaseModel):\n    a: int\ndef pipeline():\n    Config(a='x')\n",
        r"config\.py, line 5: its pipeline\(\) failed: Config\.a: Input should be a valid integer",
    ),
    "needs": ("def pipeline(*, corpus):\n    pass\n", r"needs the parameter corpus: add --param corpus=VALUE"),
    "json": ("def pipeline():\n    pass\n", r"json\.py: Python has a module called 'json' already"),
    "ray": ("def pipeline():\n    pass\n", r"ray\.py: Python has a module called 'ray' already"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_gives_no_pipeline_is_told_of_in_one_sentence_that_names_it(name, tmp_path):
    text, message = FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        load_pipeline(str(tmp_path / f"{name}.py"))
    assert "\n" not in str(refused.value)


def test_a_name_that_is_nearly_a_file_or_a_folder_gets_a_hint(tmp_path):
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(UserError, match=r"did you mean the file .*mine\.py\?"):
        load_pipeline(str(tmp_path / "mine"))
    with pytest.raises(UserError, match="is a folder: name the Python file in it"):
        load_pipeline(str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_pipeline("quickstrt")


def test_parameters_are_those_that_can_be_given_by_name_and_a_plain_one_is_a_text(tmp_path):
    text = (
        "from ropewalk.infra.step import Pipeline\n"
        "def pipeline(*, size: int = 1, name=None, **rest):\n    return Pipeline(f'{name}-{size + 1}', ())\n"
    )
    (tmp_path / "free.py").write_text(text)
    assert pipeline_parameters(str(tmp_path / "free.py")) == ["size", "name"]
    loaded = load_pipeline(str(tmp_path / "free.py"), ("size=3", "name=x=y"))
    assert loaded.pipeline.name == "x=y-4" and loaded.import_paths == (str(tmp_path),)
