import json
import re
import signal
import subprocess
import sys

import pytest
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.data.alignment import agent_write
from ropewalk.stages.data.alignment.agent_write import AgentWriteConfig, parse_plan
from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.schema import read_artifact, read_table

CONFIG = {"generation": {"model": "writer"}}
PLAN = (
    "Paragraph 1 - Main Point: the walk - Word Count: 300 words\n\n"
    "Paragraph 2 - Main Point: the rope - and hemp - Word Count: 1,200 words"
)


def writer(messages):
    """Plans two paragraphs; writes the number of each, with how many paragraphs it was shown."""
    text = messages[-1]["content"]
    if "plan it, paragraph by paragraph" in text:
        return {"mute": "I cannot.", "long": many(51), "fifty": many(50)}.get(text.split("\n")[4], PLAN)
    written = text.split("Written so far:\n\n")[1].split("Now write")[0]
    number = re.search(r"only this one:\n\nParagraph (\d+)", text)[1]
    return f"written {number} after {written.count('written')}"


def many(count):
    return "\n".join(f"Paragraph {n} - Main Point: x - Word Count: 200 words" for n in range(1, count + 1))


@pytest.fixture
def run(tmp_path, write_chats, server):
    server.answer = writer

    def run(chats, config=CONFIG, name="out", **slots):
        config = AgentWriteConfig.model_validate(config)
        slots = {"chats": write_chats(chats, f"{name}-chats"), **slots}
        folder = run_stage(agent_write, config, slots, tmp_path / name)
        agent_write.check(config, folder)
        return read_table(folder, "chats").to_pylist(), read_artifact(folder, "chats")

    return run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAN, [300, 1200]),
        ("**Paragraph 1** - **Main Point:** a - **Word Count:** 400 words", [400]),
        ("- Paragraph 1 – Main Point: a – Word Count: about 250 words.", [250]),
        ("Paragraph 1: a, b (500 words)", [500]),
        ("Paragraph 2 - Main Point: a - Word Count: 400 words", None),
        ("Here is the plan:\n" + PLAN, None),
        ("Paragraph 1 - Main Point: a", None),
        ("", None),
    ],
)
def test_a_plan_is_parsed_or_it_is_not(text, words):
    steps = parse_plan(text)
    assert (steps and [step.num_words for step in steps]) == words


def test_each_paragraph_is_written_after_those_before_it(run, server):
    system = {"role": "system", "content": "be kind"}
    rows, artifact = run({"a": ([system, user("an essay {plan}"), assistant("old")], {"topic": "rope"})})
    assert rows[0]["messages"] == [system, user("an essay {plan}"), assistant("written 1 after 0\n\nwritten 2 after 1")]
    metadata = json.loads(rows[0]["metadata"])
    assert metadata["topic"] == "rope"
    assert metadata["agent_write"] == {
        "plan": PLAN.split("\n\n"), "planned_words": [300, 1200], "num_words": 8,
    }  # fmt: skip
    assert artifact.details == {
        "model": "writer", "num_steps": 2, "num_steps_out_of_range": 1, "num_planned_words": 1500, "num_words": 8,
    }  # fmt: skip
    shown = server.bodies[2]["messages"][0]["content"]
    assert shown.index("an essay {plan}") < shown.index(PLAN.split("\n\n")[1]) < shown.index("written 1 after 0")
    assert "between 200 and 1000 words" in server.bodies[0]["messages"][0]["content"]


def test_plans_that_cannot_be_carried_out_are_dropped(run):
    chats = {name: [user(name)] for name in ("fine", "mute", "long", "fifty")}
    chats["turns"] = [user("a"), assistant("b"), user("c")]
    rows, artifact = run(chats)
    assert [row["sample_id"] for row in rows] == ["fine", "fifty"]
    assert artifact.counts["num_dropped_unparsable_plan"] == 1
    assert artifact.counts["num_dropped_too_many_steps"] == 1
    assert artifact.counts["num_dropped_several_turns"] == 1
    assert artifact.counts["num_in"] == 5
    assert artifact.counts["num_calls"] == 3 + 1 + 1 + 51


def test_another_limit_asks_only_for_the_new_paragraphs(run, server):
    chats = {name: [user(name)] for name in ("fine", "long")}
    run(chats)
    asked = server.num_requests
    rows, _ = run(chats, {**CONFIG, "max_steps": 51}, "more")
    assert len(rows) == 2
    assert server.num_requests == asked + 51
    run(chats, {**CONFIG, "max_steps": 51}, "same")
    assert server.num_requests == asked + 51


def test_prompts_must_show_what_they_are_for():
    with pytest.raises(ValidationError, match=r"write_prompt must hold \{text\}"):
        AgentWriteConfig(write_prompt="{instruction} {plan} {step}")
    with pytest.raises(ValidationError, match="max_words 1 is below min_words"):
        AgentWriteConfig(max_words=1)


CHILD = """
import sys
from pathlib import Path
from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.alignment import agent_write
root = Path(sys.argv[1])
output = Output(root / sys.argv[2] / "data", root / sys.argv[2] / "observed")
for folder in (output.data, output.observed):
    folder.mkdir(parents=True)
config = agent_write.AgentWriteConfig(generation={"model": "writer"})
agent_write.run(config, {"chats": root / "chats"}, output, LocalContext(root / "work"))
"""


def test_a_killed_process_has_lost_at_most_the_calls_in_flight(tmp_path, write_chats, server, monkeypatch):
    monkeypatch.setenv("ROPEWALK_CALL_CACHE", "off")
    monkeypatch.setenv("ROPEWALK_CHAT_THREADS", "2")
    write_chats({f"c{number}": [user(f"essay {number}")] for number in range(8)})
    child = None

    def deadly(messages):
        if server.num_requests >= 12:
            child.send_signal(signal.SIGKILL)
            child.wait()
        return writer(messages)

    server.answer = deadly
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "killed"])
    assert child.wait() == -signal.SIGKILL
    server.answer = writer
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "again"], check=True)
    assert len(read_table(tmp_path / "again" / "data", "chats")) == 8
    bodies = [json.dumps(body, sort_keys=True) for body in server.bodies]
    assert len(set(bodies)) == 8 * 3
    assert 0 < len(bodies) - len(set(bodies)) <= 2
