import json
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.alignment.calls import (
    CallFolder,
    GenerationConfig,
    cache_folder,
    calls_schema,
    open_caller,
    request_key,
)
from ropewalk.stages.data.alignment.conversations import user
from ropewalk.stages.data.alignment.endpoint import CallFailedError, Completion
from ropewalk.stages.data.alignment.generation import DroppedError, SampleWriter, generate, make_samples
from ropewalk.stages.schema import chats_schema, read_table, write_table

GENERATION = GenerationConfig(model="m", max_new_tokens=9)


def caller_for(tmp_path, config=GENERATION, **slots):
    return open_caller(config, slots, LocalContext(tmp_path / "work"))


def test_a_request_says_all_that_decides_the_answer_and_nothing_else(tmp_path, server, monkeypatch):
    config = GenerationConfig(model="m", temperature=0.5, top_p=0.9, max_new_tokens=9, extra_fields={"k": [1]})
    caller = caller_for(tmp_path, config)
    request = caller.request([user("q")])
    assert request == {
        "model": "m", "messages": [user("q")], "temperature": 0.5, "top_p": 0.9, "max_tokens": 9,
        "seed": request["seed"], "k": [1],
    }  # fmt: skip
    assert caller.request([user("q")], attempt=1)["seed"] != request["seed"]
    assert "seed" not in caller_for(tmp_path, GenerationConfig(model="m", seed=None)).request([user("q")])
    renamed = GenerationConfig(model="m", max_tokens_field="max_completion_tokens")
    assert caller_for(tmp_path, renamed).request([user("q")])["max_completion_tokens"] == 4096
    keys = {
        request_key(caller_for(tmp_path, other).request([user(text)], attempt))
        for other in (config, config.model_copy(update={"seed": 1}), config.model_copy(update={"model": "n"}))
        for text in ("q", "r")
        for attempt in (0, 1)
    }
    assert len(keys) == 12
    monkeypatch.setenv("ROPEWALK_CHAT_URL", "http://elsewhere/v1")
    assert request_key(caller_for(tmp_path, config).request([user("q")])) in keys


def test_a_question_is_asked_once(tmp_path, server):
    caller = caller_for(tmp_path)
    first, again, other = (caller.ask([user(text)]) for text in ("q", "q", "r"))
    assert (first, server.num_requests) == (again, 2)
    assert other != first
    assert caller.tally.counts["num_cached_calls"] == 1
    assert caller.tally.counts["num_fresh_calls"] == 2


def test_two_samples_with_one_question_at_once_wait_for_one_answer(tmp_path, server):
    server.faults = ["slow"]
    caller = caller_for(tmp_path)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(caller.ask([user("q")]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.num_requests == 1
    assert len(answers) == 4 and all(answer == answers[0] for answer in answers)


def test_the_cache_folder_outlives_the_step(tmp_path, server, monkeypatch):
    caller_for(tmp_path / "one").ask([user("q")])
    caller_for(tmp_path / "two").ask([user("q")])
    assert server.num_requests == 1
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    caller_for(tmp_path / "three").ask([user("q")])
    assert server.num_requests == 2
    caller_for(tmp_path / "three").ask([user("q")])  # Its own work folder still knows.
    assert server.num_requests == 2


def test_a_kept_answer_needs_neither_endpoint_nor_address(tmp_path, server, monkeypatch):
    answer = caller_for(tmp_path).ask([user("q")])
    monkeypatch.delenv("ROPEWALK_CHAT_URL")
    caller = caller_for(tmp_path / "other")
    assert caller.ask([user("q")]) == answer
    with pytest.raises(ValueError, match="set ROPEWALK_CHAT_URL"):
        caller.ask([user("r")])


def test_the_calls_of_an_earlier_artifact_are_known(tmp_path, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    answer = caller_for(tmp_path / "one").ask([user("q")])
    write_table(tmp_path / "earlier", "calls", calls_schema(), [answer.record()])
    caller = caller_for(tmp_path / "two", calls=tmp_path / "earlier")
    assert caller.ask([user("q")]) == answer
    assert server.num_requests == 1


def test_a_damaged_file_is_asked_for_again_and_replaced(tmp_path, server):
    caller = caller_for(tmp_path)
    answer = caller.ask([user("q")])
    files = [*(tmp_path / "work").rglob("*.json"), *(tmp_path / "call-cache").rglob("*.json")]
    assert len(files) == 2
    for path in files:
        path.write_text('{"text": "half')
    assert caller.ask([user("q")]) == answer
    assert server.num_requests == 2
    assert [json.loads(path.read_text())["text"] for path in files] == [answer.completion.text] * 2
    assert not [path for path in (tmp_path / "call-cache").rglob(".*") if path.is_file()]


def test_the_first_of_two_answers_is_kept(tmp_path):
    folder = CallFolder(tmp_path)
    one, two = (Completion(text=text, finish_reason="stop") for text in "ab")
    assert folder.put("00ff", one) == one
    assert folder.put("00ff", two) == one == folder.get("00ff")


def test_failures_are_not_kept(tmp_path, server):
    server.faults = [400]
    caller = caller_for(tmp_path)
    with pytest.raises(CallFailedError):
        caller.ask([user("q")])
    assert caller.ask([user("q")]).completion.text == "answer 1"


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "call-cache"
    monkeypatch.delenv("ROPEWALK_CALL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/ropewalk/calls")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ropewalk" / "calls"


def test_a_cache_folder_that_cannot_be_used_is_told_and_the_usual_one_done_without(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", str(tmp_path / "file" / "calls"))
    with pytest.raises(ValueError, match="ROPEWALK_CALL_CACHE names a folder that cannot be used"):
        caller_for(tmp_path)
    monkeypatch.delenv("ROPEWALK_CALL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caller = caller_for(tmp_path)
    assert caller.ask([user("q")]).completion.text == "answer 1"
    assert caller.tally.counts["num_unusable_cache_folders"] == 1


def test_model_and_endpoint_exclude_each_other(tmp_path, model_folder):
    for config, slots in [(GENERATION, {"model": model_folder}), (GenerationConfig(), {})]:
        with pytest.raises(ValueError, match="give one"):
            caller_for(tmp_path, config, **slots)
    with pytest.raises(ValueError, match="extra_fields does not apply"):
        caller_for(tmp_path, GenerationConfig(extra_fields={"k": 1}), model=model_folder)
    with pytest.raises(ValidationError, match="'messages' has a field of its own"):
        GenerationConfig(model="m", extra_fields={"messages": []})


# --- samples ------------------------------------------------------------------------------------------------------


def make(sample, ask):
    """Two calls, the second with the first's answer in it."""
    first = ask([user(f"first {sample}")])
    second = ask([user(f"second {sample} {first}")])
    if second == "bad":
        raise DroppedError("bad")
    messages = [user(first), {"role": "assistant", "content": second}]
    return {"sample_id": str(sample), "source": "s", "messages": messages, "metadata": "{}"}


@pytest.fixture
def run(tmp_path, events):
    def run(samples, config=GENERATION, name="run", function=make, work=None, **slots):
        output = Output(tmp_path / name / "data", tmp_path / name / "observed")
        for folder in (output.data, output.observed):
            folder.mkdir(parents=True)
        context = LocalContext(tmp_path / (work or f"{name}-work"), events.report)
        writer = SampleWriter(output, "chats", chats_schema(), ("bad", "call_failed", "truncated", "filtered",
                              "empty_answer"), len(samples), config.max_failed_fraction)  # fmt: skip
        counts = generate(writer, samples, function, open_caller(config, slots, context), context)
        rows = read_table(output.data, "chats").to_pylist()
        observed = json.loads((output.observed / "calls.json").read_text())
        return rows, counts, observed, output.data

    return run


def test_samples_come_in_order_whatever_the_threads_do(run, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "4")
    server.faults = ["slow", None, None, "slow"]
    rows, counts, observed, folder = run(list(range(20)))
    assert [row["sample_id"] for row in rows] == [str(number) for number in range(20)]
    assert counts["num_in"] == counts["num_kept"] == 20
    assert counts["num_calls"] == server.num_requests == observed["num_fresh_calls"] == 40
    assert 2 <= server.most_running <= 4
    assert read_table(folder, "calls").num_rows == 40


def test_the_bytes_do_not_depend_on_the_threads(run, server, monkeypatch):
    _, _, _, four = run(list(range(9)), name="a")
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "1")
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    _, _, _, one = run(list(range(9)), name="b")
    for path in sorted(four.iterdir()):
        assert path.read_bytes() == (one / path.name).read_bytes()


def test_a_rerun_costs_nothing(run, server, monkeypatch):
    first, *_ = run(list(range(5)))
    asked = server.num_requests
    again, _, observed, folder = run(list(range(5)), name="again")
    assert (again, server.num_requests, observed["num_cached_calls"]) == (first, asked, asked)
    run(list(range(6)), GenerationConfig(model="m", max_new_tokens=9, max_failed_fraction=0.5), name="more")
    assert server.num_requests == asked + 2
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    run(list(range(5)), name="slot", calls=folder)
    assert server.num_requests == asked + 2


def test_what_was_answered_before_a_crash_is_not_asked_again(run, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "1")

    def crash(sample, ask):
        if sample == 3:
            raise KeyError("power cut")
        return make(sample, ask)

    with pytest.raises(KeyError, match="power cut"):
        run(list(range(6)), name="crashed", function=crash, work="work")
    asked = server.num_requests
    assert asked >= 6
    run(list(range(6)), name="retried", work="work")
    assert server.num_requests == 12


def test_drops_are_counted_by_reason(run, server):
    answers = {"first 1": "  ", "second 2 ok": "bad"}
    server.answer = lambda messages: answers.get(messages[0]["content"], "ok")
    _, counts, _, _ = run(list(range(4)))
    assert (counts["num_kept"], counts["num_dropped_empty_answer"], counts["num_dropped_bad"]) == (2, 1, 1)
    for finish, reason in (("length", "truncated"), ("content_filter", "filtered")):
        server.finish_reason = finish
        with pytest.raises(ValueError, match=f"'num_dropped_{reason}': 4"):
            run([f"{finish}{number}" for number in range(4)], name=finish)


def test_failed_samples_are_dropped_up_to_a_fraction(run, server, monkeypatch, events):
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "1")
    monkeypatch.setenv("ROPEWALK_CHAT_ATTEMPTS", "2")
    server.faults = [500, 500, 429, None]
    lenient = GENERATION.model_copy(update={"max_failed_fraction": 0.25})
    rows, counts, observed, _ = run(list(range(4)), lenient)
    assert [row["sample_id"] for row in rows] == ["1", "2", "3"]
    assert (counts["num_in"], counts["num_kept"], counts["num_dropped_call_failed"]) == (4, 3, 1)
    assert (observed["num_retries_status_5xx"], observed["num_retries_status_429"]) == (2, 1)
    assert events.metrics["num_retries_status_5xx"] == 2
    server.faults = [500, 500]
    with pytest.raises(RuntimeError, match=r"1 of 4 samples have a call without an answer .*status_5xx after 2"):
        run([f"n{number}" for number in range(4)], name="strict")


def test_a_key_that_is_refused_stops_the_step_soon(run, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "2")
    server.faults = [401] * 100
    with pytest.raises(ValueError, match="answers 401"):
        run(list(range(50)))
    assert server.num_requests <= 8


def test_a_failing_step_does_not_wait_for_long_patience(run, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "2")
    server.faults = [(429, "300"), 401, 401]
    started = time.perf_counter()
    with pytest.raises(ValueError, match="answers 401"):
        run(list(range(2)), name="impatient", function=lambda sample, ask: make(sample, ask))
    assert time.perf_counter() - started < 30


def test_samples_are_read_as_they_are_needed(tmp_path, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "2")
    read = []
    samples = (read.append(number) or number for number in range(100))
    made = make_samples(samples, make, caller_for(tmp_path))
    assert next(made).record["sample_id"] == "0"
    assert len(read) <= 2 * 2 + 1
    made.close()
    assert server.num_requests <= 2 * 5 + 2
