import hashlib
import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage, write_documents
from transformers import AutoTokenizer

from ropewalk.stages.data import encode
from ropewalk.stages.data.encode import EncodeConfig, sample_texts
from ropewalk.stages.data.vocabulary import train_tokenizer
from ropewalk.stages.schema import (
    Artifact,
    documents_schema,
    read_artifact,
    read_table,
    shard_paths,
    tokens_schema,
    write_artifact,
    write_table,
)

MARKERS = ("<|key|>", "<|ask|>")
TEXTS = {
    "code/a.py": "def walk(rope):\n\treturn [strand for strand in rope if strand]\n" * 20,
    "code/b.py": "class Rope:\n    def __init__(self, strands):\n        self.strands = strands\n" * 20,
    "prose/c": "the quick brown fox jumps over the lazy dog, the rope walk is long and straight.\n" * 20,
    "prose/d": "x",
    "prose/e": "naïve café \U0001f389\U0001f3fd  \u00a0 日本語\r\n",
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    documents = write_documents(root / "documents", TEXTS)
    config = EncodeConfig(vocab_size=320, added_tokens=MARKERS)
    return run_stage(encode, config, {"documents": documents}, root / "out")


@pytest.fixture(scope="module")
def tokenizer(encoded):
    return AutoTokenizer.from_pretrained(encoded / "tokenizer")


def ids_by_document(folder):
    return {row["doc_id"]: row["input_ids"] for row in read_table(folder, "tokens").to_pylist()}


def test_every_document_is_one_row_that_decodes_to_its_text(encoded, tokenizer):
    assert read_table(encoded, "tokens").schema.equals(tokens_schema())
    ids = ids_by_document(encoded)
    assert list(ids) == list(TEXTS)
    assert {name: tokenizer.decode(tokens) for name, tokens in ids.items()} == TEXTS
    assert ids == {name: tokenizer(text, add_special_tokens=False).input_ids for name, text in TEXTS.items()}
    assert not any({tokenizer.bos_token_id, tokenizer.eos_token_id} & set(tokens) for tokens in ids.values())


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(" \t\r\n  \x00\u200b\ufeff")
@example("\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 ﬁ")
def test_any_text_survives_the_saved_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id


def test_the_artifact_describes_the_tokenizer(encoded, tokenizer):
    info = read_artifact(encoded, "tokens").tokenizer
    assert info.digest == hashlib.sha256((encoded / "tokenizer/tokenizer.json").read_bytes()).hexdigest()
    assert (info.bos_token_id, info.eos_token_id) == (0, 1) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert info.added_tokens == {"<|key|>": 320, "<|ask|>": 321}
    assert info.vocab_size == len(tokenizer) == 322
    assert tokenizer.encode("<|ask|>", add_special_tokens=False) == [321], "the saved tokenizer knows its markers"


def test_no_file_names_this_machine(encoded, tmp_path_factory):
    for path in encoded.rglob("*.json"):
        assert str(tmp_path_factory.getbasetemp()) not in path.read_text()


@pytest.mark.parametrize("spelling", ["<|key|>", "<|ask|>", "<|bos|>", "<|eos|>"])
def test_the_spelling_of_a_special_token_stays_text(tmp_path, spelling):
    text = f"if token == '{spelling}':{spelling}{spelling}"
    documents = write_documents(tmp_path / "documents", {**TEXTS, "code/special": text})
    out = run_stage(
        encode, EncodeConfig(vocab_size=320, added_tokens=MARKERS), {"documents": documents}, tmp_path / "out"
    )
    tokens = ids_by_document(out)["code/special"]
    info = read_artifact(out).tokenizer
    assert not {info.bos_token_id, info.eos_token_id, *info.added_tokens.values()} & set(tokens)
    assert AutoTokenizer.from_pretrained(out / "tokenizer").decode(tokens) == text


def test_added_tokens_change_no_other_id(encoded, tmp_path):
    documents = write_documents(tmp_path / "documents", TEXTS)
    plain = run_stage(encode, EncodeConfig(vocab_size=320), {"documents": documents}, tmp_path / "out")
    assert read_table(plain, "tokens").equals(read_table(encoded, "tokens"))


def document(name, text):
    return {"doc_id": name, "text": text, "source": "s", "num_bytes": len(text.encode()), "metadata": "{}"}


def test_shards_of_tokens_follow_shards_of_documents(tmp_path):
    rows = [document(name, text) for name, text in TEXTS.items()]
    outputs = []
    for shard_records in (2, 100):
        documents = tmp_path / f"documents{shard_records}"
        write_table(documents, "documents", documents_schema(), rows, shard_records=shard_records)
        write_artifact(documents, Artifact(kind="documents", counts={"num_kept": len(rows)}))
        outputs.append(
            run_stage(encode, EncodeConfig(vocab_size=300), {"documents": documents}, tmp_path / f"{shard_records}")
        )
    assert [len(shard_paths(out, "tokens")) for out in outputs] == [3, 1]
    assert read_table(outputs[0], "tokens").equals(read_table(outputs[1], "tokens"))


def test_documents_that_are_missing_are_noticed(tmp_path):
    documents = write_documents(tmp_path / "documents", TEXTS)
    write_artifact(documents, Artifact(kind="documents", counts={"num_kept": 6}))
    with pytest.raises(ValueError, match="should hold 6 documents, but has 5"):
        run_stage(encode, EncodeConfig(vocab_size=300), {"documents": documents}, tmp_path / "out")


def test_statistics_add_up(encoded):
    report = json.loads((encoded / "statistics.json").read_text())
    lengths = {name: len(tokens) for name, tokens in ids_by_document(encoded).items()}
    assert report["num_tokens"] == sum(lengths.values()) == read_artifact(encoded).counts["num_tokens"]
    assert report["num_bytes"] == sum(len(text.encode()) for text in TEXTS.values())
    assert report["sources"]["test"]["num_documents"] == report["num_documents"] == len(TEXTS)
    bins = {(b["from"], b["to"]): b["num_documents"] for b in report["documents_by_length_tokens"]}
    expected = Counter(next((2**k, 2 ** (k + 1) - 1) for k in range(20) if 2 ** (k + 1) > n) for n in lengths.values())
    assert bins == expected
    assert (encoded.parent / "observed/token_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_equal_inputs_give_equal_bytes_in_another_process(encoded, tmp_path):
    # Hash maps are seeded anew in every process.
    script = (
        "import sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "from row_invariants import run_stage, write_documents\n"
        "from ropewalk.stages.data import encode\n"
        f"root, texts = Path({str(tmp_path)!r}), {TEXTS!r}\n"
        "documents = write_documents(root / 'documents', texts)\n"
        f"config = encode.EncodeConfig(vocab_size=320, added_tokens={MARKERS!r})\n"
        "run_stage(encode, config, {'documents': documents}, root / 'out')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    here, there = (
        {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (encoded, tmp_path / "out/data")
    )
    assert here == there


def given_tokenizer(folder, **changes):
    """A tokenizer folder as a user brings it; `changes` are settings of its `tokenizer.json`."""
    train_tokenizer(TEXTS.values(), 300, "<s>", "</s>").save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def encode_with(tmp_path, tokenizer, texts=TEXTS, **fields):
    documents = write_documents(tmp_path / "documents", texts)
    inputs = {"documents": documents, "tokenizer": tokenizer}
    return run_stage(encode, EncodeConfig(**fields), inputs, tmp_path / "out")


def test_a_given_tokenizer_is_extended_and_otherwise_kept(tmp_path):
    folder = given_tokenizer(tmp_path / "given")
    before = AutoTokenizer.from_pretrained(folder)
    out = encode_with(tmp_path, folder, added_tokens=("<|key|>", "</s>"))
    info = read_artifact(out).tokenizer
    assert info.added_tokens == {"<|key|>": 300, "</s>": 1}
    assert info.vocab_size == 301
    after = AutoTokenizer.from_pretrained(out / "tokenizer").get_vocab()
    assert after == {**before.get_vocab(), "<|key|>": 300}
    assert ids_by_document(out) == {n: before(t, add_special_tokens=False).input_ids for n, t in TEXTS.items()}


def test_truncation_and_padding_of_a_given_tokenizer_are_ignored(tmp_path):
    cut = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padded = {"strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None}
    padded |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    out = encode_with(tmp_path, given_tokenizer(tmp_path / "given", truncation=cut, padding=padded))
    given = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert {name: given.decode(ids) for name, ids in ids_by_document(out).items()} == TEXTS


def test_documents_that_yield_no_token_are_dropped_and_counted(tmp_path):
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    folder = given_tokenizer(tmp_path / "given", normalizer=strip)
    out = encode_with(tmp_path, folder, {"a": "  \n", "b": " rope "})
    assert list(ids_by_document(out)) == ["b"]
    counts = read_artifact(out).counts
    assert (counts["num_in"], counts["num_kept"], counts["num_dropped_no_tokens"]) == (2, 1, 1)
    with pytest.raises(ValueError, match=r"no document of .* yields a token"):
        encode_with(tmp_path / "again", folder, {"a": "  \n"})


def test_without_a_begin_token_the_end_token_begins(tmp_path):
    folder = given_tokenizer(tmp_path / "given")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "bos_token"}))
    info = read_artifact(encode_with(tmp_path, folder)).tokenizer
    assert info.bos_token_id == info.eos_token_id == 1
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        encode_with(tmp_path / "again", folder)


def test_begin_and_end_token_may_be_one(tmp_path):
    documents = write_documents(tmp_path / "documents", TEXTS)
    config = EncodeConfig(vocab_size=300, bos_token="<|end|>", eos_token="<|end|>")
    out = run_stage(encode, config, {"documents": documents}, tmp_path / "out")
    info = read_artifact(out).tokenizer
    assert info.bos_token_id == info.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(out / "tokenizer").decode(ids_by_document(out)["prose/e"]) == TEXTS["prose/e"]


@pytest.mark.parametrize(
    ("fields", "slots", "message"),
    [
        ({}, ["documents"], "either vocab_size, to train a tokenizer, or an input slot"),
        ({"vocab_size": 300}, ["documents", "tokenizer"], "either vocab_size, to train a tokenizer, or an input slot"),
        ({"added_tokens": ["e"]}, ["documents", "tokenizer"], "'e' is an ordinary token of the tokenizer"),
    ],
)
def test_contradictions_are_errors(tmp_path, fields, slots, message):
    inputs = {
        "documents": write_documents(tmp_path / "documents", TEXTS),
        "tokenizer": given_tokenizer(tmp_path / "given"),
    }
    with pytest.raises(ValueError, match=message):
        run_stage(encode, EncodeConfig(**fields), {slot: inputs[slot] for slot in slots}, tmp_path / "out")


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no tokenizer"):
        encode_with(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("fields", [{"vocab_size": 257}, {"added_tokens": ["a", "a"]}, {"added_tokens": [""]}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValidationError):
        EncodeConfig(**fields)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), train_bytes=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_every_nth_document_trains_the_tokenizer(tmp_path_factory, sizes, train_bytes):
    texts = {str(index): chr(97 + index % 26) * size for index, size in enumerate(sizes)}
    documents = tmp_path_factory.mktemp("sample")
    write_table(documents, "documents", documents_schema(), map(document, texts, texts.values()), shard_records=4)
    step = next(n for n in range(1, 1000) if sum(sizes) / n <= train_bytes)
    assert list(sample_texts(documents, train_bytes)) == list(texts.values())[::step]
