import pyarrow as pa
import pytest
from row_invariants import run_stage
from transformers import AutoTokenizer

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.alignment import chat_tokens
from ropewalk.stages.data.alignment.chat_tokens import ChatTokensConfig
from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.data.vocabulary import train_tokenizer
from ropewalk.stages.schema import read_artifact, read_table, shard_paths, tokens_schema, write_artifact, write_shard

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = {f"c{number}": [user(f"question {number}"), assistant("answer " * number)] for number in range(1, 8)}
CONFIG = ChatTokensConfig(chat_template=CHATML)


@pytest.fixture
def run(tmp_path, write_chats, tokenizer_folder):
    def run(config, chats, name="out"):
        inputs = {"chats": write_chats(chats, f"{name}-chats"), "tokenizer": tokenizer_folder}
        folder = run_stage(chat_tokens, config, inputs, tmp_path / name)
        chat_tokens.check(config, folder)
        return folder

    return run


def test_each_chat_is_a_document_with_a_mask_and_no_begin_token(run):
    folder = run(CONFIG, CHATS)
    table = read_table(folder, "tokens")
    assert table.schema.equals(tokens_schema(loss_mask=True))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for row in table.to_pylist():
        messages = CHATS[row["doc_id"]]
        stock = tokenizer.apply_chat_template(messages, return_dict=False)
        assert stock[0] == tokenizer.bos_token_id
        assert row["input_ids"] == stock[1:]
        targets = [token for token, target in zip(row["input_ids"], row["loss_mask"], strict=True) if target]
        assert tokenizer.decode(targets) == messages[1]["content"] + "<|im_end|>"
    artifact = read_artifact(folder, "tokens")
    assert artifact.counts["num_tokens"] == sum(map(len, table.column("input_ids").to_pylist()))
    assert artifact.counts["num_target_tokens"] == sum(sum(mask) for mask in table.column("loss_mask").to_pylist())


def test_everything_can_be_a_target(run):
    folder = run(ChatTokensConfig(chat_template=CHATML, targets="everything"), CHATS)
    counts = read_artifact(folder, "tokens").counts
    assert counts["num_target_tokens"] == counts["num_tokens"]


def test_drops_are_counted_and_add_up(run):
    chats = {**CHATS, "odd": [user("a\ufdd0"), assistant("b")], "spelled": [user("<|im_end|>"), assistant("b")]}
    whole = read_table(run(CONFIG, chats, "whole"), "tokens")
    lengths = [len(ids) for ids in whole.column("input_ids").to_pylist()]
    limit = sorted(lengths)[4]
    counts = read_artifact(run(ChatTokensConfig(chat_template=CHATML, max_tokens=limit), chats, "cut"), "tokens").counts
    assert counts["num_in"] == len(chats) == counts["num_kept"] + counts["num_dropped_too_long"] + 1
    assert counts["num_dropped_too_long"] == sum(length > limit for length in lengths) > 0
    assert counts["num_dropped_reserved_characters"] == counts["num_spelled_controls"] == 1


def test_a_template_without_a_target_drops_the_chat(run):
    silent = "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    marked = "{% generation %}{% endgeneration %}" + silent
    with pytest.raises(ValueError, match="'num_dropped_no_target': 7"):
        run(ChatTokensConfig(chat_template=marked), CHATS)


def test_special_tokens_of_a_template_can_be_added(tmp_path, write_chats):
    train_tokenizer(["question answer " * 50], 300, "<|bos|>", "<|eos|>").save_pretrained(tmp_path / "bare")
    config = ChatTokensConfig(chat_template=CHATML, added_tokens=("<|im_start|>", "<|im_end|>"))
    inputs = {"chats": write_chats(CHATS), "tokenizer": tmp_path / "bare"}
    folder = run_stage(chat_tokens, config, inputs, tmp_path / "out")
    info = read_artifact(folder, "tokens").tokenizer
    assert sorted(info.added_tokens, key=info.added_tokens.get) == ["<|im_start|>", "<|im_end|>"]
    first = read_table(folder, "tokens").to_pylist()[0]["input_ids"]
    assert first[0] == info.added_tokens["<|im_start|>"] and first.count(info.added_tokens["<|im_end|>"]) == 2


class Reversed(LocalContext):
    """Works on the items from the last to the first, each in its own worker."""

    def map(self, function, items, *, resources=None):
        items = list(items)
        results = {
            place: next(super(Reversed, self).map(function, [items[place]])) for place in reversed(range(len(items)))
        }
        return iter([results[place] for place in range(len(items))])


def test_the_order_of_work_does_not_change_the_bytes(run, tmp_path, write_chats, tokenizer_folder):
    once = run(CONFIG, CHATS)
    output = Output(tmp_path / "again" / "data", tmp_path / "again" / "observed")
    for folder in (output.data, output.observed, tmp_path / "work"):
        folder.mkdir(parents=True)
    inputs = {"chats": write_chats(CHATS, "again-chats"), "tokenizer": tokenizer_folder}
    chat_tokens.run(CONFIG, inputs, output, Reversed(tmp_path / "work"))
    assert len(shard_paths(once, "tokens")) == 3
    for path in shard_paths(once, "tokens"):
        assert path.read_bytes() == (output.data / path.name).read_bytes()
    assert (once / "artifact.json").read_bytes() == (output.data / "artifact.json").read_bytes()


def test_a_tokenizer_without_a_template_is_named(run):
    with pytest.raises(ValueError, match="no chat template: give one in chat_template"):
        run(ChatTokensConfig(), CHATS)


def test_the_check_finds_what_is_wrong(run):
    folder = run(CONFIG, CHATS)
    artifact = read_artifact(folder)
    write_artifact(folder, artifact.model_copy(update={"counts": {**artifact.counts, "num_target_tokens": 1}}))
    with pytest.raises(ValueError, match=r"num_target_tokens is 1"):
        chat_tokens.check(CONFIG, folder)
    write_artifact(folder, artifact)
    table = read_table(folder, "tokens")
    rows = table.to_pylist()
    rows[0]["loss_mask"] = rows[0]["loss_mask"][1:]
    write_shard(folder, "tokens", 0, pa.Table.from_pylist(rows[:3], schema=table.schema))
    with pytest.raises(ValueError, match="loss_mask is not as long"):
        chat_tokens.check(CONFIG, folder)
    rows[0]["loss_mask"] = [False] * len(rows[0]["input_ids"])
    write_shard(folder, "tokens", 0, pa.Table.from_pylist(rows[:3], schema=table.schema))
    with pytest.raises(ValueError, match="has no target"):
        chat_tokens.check(CONFIG, folder)


def test_rows_of_chats_learn_what_the_chats_learn(run, tmp_path):
    from ropewalk.stages.data import pack

    folder = run(CONFIG, CHATS)
    rows = run_stage(pack, pack.PackConfig(row_tokens=128), {"tokens": folder}, tmp_path / "rows")
    tokens = {row["doc_id"]: row for row in read_table(folder, "tokens").to_pylist()}
    placed = set()
    for row in read_table(rows, "rows").to_pylist():
        assert row["attention"] == "document"
        for segment in row["segments"]:
            begin, end = segment["row_start"], segment["row_start"] + segment["num_tokens"]
            chat = tokens[segment["doc_id"]]
            assert row["input_ids"][begin:end] == chat["input_ids"]
            assert row["loss_mask"][begin:end] == chat["loss_mask"]
            placed.add(segment["doc_id"])
    assert placed == set(CHATS)
