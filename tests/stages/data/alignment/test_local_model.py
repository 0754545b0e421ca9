import pytest
from row_invariants import run_stage

from ropewalk.stages.context import LocalContext
from ropewalk.stages.data.alignment import agent_write
from ropewalk.stages.data.alignment.agent_write import AgentWriteConfig
from ropewalk.stages.data.alignment.calls import GenerationConfig, open_caller
from ropewalk.stages.data.alignment.conversations import user
from ropewalk.stages.data.alignment.endpoint import CallFailedError
from ropewalk.stages.data.alignment.local_model import model_name

QUESTION, ANSWER = "who are you?", "the rope walk is long"


def ask(folder, work, question=QUESTION, **settings):
    config = GenerationConfig(max_new_tokens=settings.pop("max_new_tokens", 24), **settings)
    return open_caller(config, {"model": folder}, LocalContext(work)).ask([user(question)]).completion


def test_a_trained_model_answers_and_says_how_it_ended(model_folder, tmp_path):
    whole = ask(model_folder, tmp_path)
    assert (whole.text, whole.finish_reason) == (ANSWER, "stop")
    cut = ask(model_folder, tmp_path, max_new_tokens=2)
    assert cut.finish_reason == "length" and ANSWER.startswith(cut.text)
    assert cut.num_completion_tokens == 2


def test_sampling_is_seeded_by_the_request(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    texts = [ask(model_folder, tmp_path / str(n), "rope", temperature=3.0, seed=n // 2).text for n in range(6)]
    assert texts[0::2] == texts[1::2]
    assert len(set(texts)) == 3


def test_a_prompt_that_does_not_fit_the_window_fails_its_call(model_folder, tmp_path):
    with pytest.raises(CallFailedError, match="do not fit the window of 512"):
        ask(model_folder, tmp_path, "rope " * 600)


def test_a_model_is_named_by_its_files(model_folder, tmp_path):
    import shutil

    copy = shutil.copytree(model_folder, tmp_path / "copy")
    assert model_name(copy) == model_name(model_folder)
    (copy / "chat_template.jinja").write_text("another")
    assert model_name(copy) != model_name(model_folder)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no"):
        model_name(copy)


def test_a_stage_runs_with_a_local_model(model_folder, tmp_path, write_chats):
    inputs = {"chats": write_chats({"a": [user(QUESTION)]}), "model": model_folder}
    # The model answers anything like its question by heart, which is no plan.
    config = AgentWriteConfig(generation=GenerationConfig(max_new_tokens=24), plan_prompt="{instruction}")
    with pytest.raises(ValueError, match="'num_dropped_unparsable_plan': 1"):
        run_stage(agent_write, config, inputs, tmp_path / "out")
