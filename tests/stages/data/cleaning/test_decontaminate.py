import json
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from cleaning_corpus import file_bytes, texts, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.data import encode, split
from ropewalk.stages.data.cleaning import decontaminate
from ropewalk.stages.data.cleaning import words as words_module
from ropewalk.stages.data.cleaning.contamination import covered_spans, covered_words, remaining_pieces
from ropewalk.stages.data.cleaning.decontaminate import DecontaminateConfig
from ropewalk.stages.data.cleaning.words import WordHashes, ngram_hashes, normal_form, split_words
from ropewalk.stages.data.encode import EncodeConfig
from ropewalk.stages.data.split import SplitConfig
from ropewalk.stages.data.vocabulary import load_tokenizer
from ropewalk.stages.episodes import MARKERS, EpisodeFormat, episode_writer
from ropewalk.stages.evaluation.scoring import samples_schema
from ropewalk.stages.evaluation.tasks import Haystack, Task, build_sample
from ropewalk.stages.schema import Artifact, read_artifact, read_table, write_artifact, write_table

QUESTION = "How many strands does a rope of three yarns have when it leaves the long ropewalk by the sea"
FILLER = [" ".join(f"word{n}x{i}" for i in range(60)) for n in range(9)]
LEAK = f"{FILLER[0]} HOW many strands, does a rope of three yarns\nhave when it leaves the Long ropewalk {FILLER[1]}"


def questions(folder, samples=None):
    return write_corpus(folder, samples or {"bench/q1": QUESTION, "bench/q2": "too short to match"})


def run(tmp_path, documents, name="out", sets=None, inputs=None, shard_records=2, **fields):
    sets = sets or {"bench": questions(tmp_path / f"{name}-bench")}
    source = write_corpus(tmp_path / f"{name}-in", documents, shard_records=shard_records)
    return run_stage(
        decontaminate,
        DecontaminateConfig(**fields),
        {"documents": source, **sets, **(inputs or {})},
        tmp_path / name,
    )


def ngrams(text, n):
    """The n-grams of a text in normal form, as tuples; independent of hashes."""
    words = [word.lower() for word in re.findall(r"\w+", text)]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_a_document_with_a_question_goes_and_is_shown(tmp_path):
    documents = {"web/0": FILLER[2], "web/1": LEAK, "web/2": FILLER[3], "web/3": QUESTION[:40]}
    out = run(tmp_path, documents)
    assert list(texts(out)) == ["web/0", "web/2", "web/3"]
    artifact = read_artifact(out)
    counts = artifact.counts
    assert (counts["num_in"], counts["num_kept"], counts["num_dropped_contaminated"]) == (4, 3, 1)
    sets = {"bench": {"num_ngrams": 7, "num_samples": 2, "num_samples_too_short": 1}}
    assert artifact.details == {"evaluation_sets": sets}
    (row,) = read_table(out, "contaminated").to_pylist()
    assert row["ngram"] in {" ".join(ngram) for ngram in ngrams(QUESTION, 13)}
    shared = len(ngrams(LEAK, 13) & ngrams(QUESTION, 13))
    assert shared == 4
    expected = {"doc_id": "web/1", "slot": "bench", "sample_id": "bench/q1", "num_ngrams": shared, "removed": True}
    assert {name: row[name] for name in expected} == expected
    decontaminate.check(None, out)


def test_the_number_of_words_decides(tmp_path):
    documents = {"web/1": LEAK, "web/2": FILLER[2]}
    assert "web/1" in texts(run(tmp_path, documents, "17", ngram_words=17))
    assert "web/1" not in texts(run(tmp_path, documents, "16", ngram_words=16))


def test_limits_keep_documents_and_still_report_them(tmp_path):
    documents = {"web/1": LEAK, "web/2": FILLER[2]}
    for name, fields in {
        "count": {"max_ngrams": 4},
        "share": {"max_overlap_fraction": 16 / 136},
    }.items():
        out = run(tmp_path, documents, name, **fields)
        assert list(texts(out)) == ["web/1", "web/2"]
        assert [row["removed"] for row in read_table(out, "contaminated").to_pylist()] == [False]
        assert read_artifact(out).counts["num_with_overlap"] == 1
    assert list(texts(run(tmp_path, documents, "less", max_ngrams=3, max_overlap_fraction=15 / 136))) == ["web/2"]


def test_common_phrases_are_ignored_when_asked(tmp_path):
    documents = {f"web/{n}": f"{QUESTION} {FILLER[n]}" for n in range(4)}
    documents["web/9"] = FILLER[5] + " " + " ".join(f"only here {n}" for n in range(9))
    sets = {"bench": questions(tmp_path / "bench", {"bench/q1": QUESTION, "bench/q2": documents["web/9"]})}
    assert list(texts(run(tmp_path, documents, "common", sets=sets, common_documents=3))) == [
        f"web/{n}" for n in range(4)
    ]
    out = run(tmp_path, {**documents, "web/ok": FILLER[8]}, "rare", sets=sets, common_documents=4)
    assert list(texts(out)) == ["web/ok"]
    assert read_artifact(out).counts["num_common_ngrams"] == 0


def test_passages_are_cut_out_with_a_margin(tmp_path):
    out = run(
        tmp_path, {"web/1": LEAK}, remove="passage", margin_characters=20, min_piece_characters=100, shard_records=1
    )
    pieces = texts(out)
    assert list(pieces) == ["web/1#0", "web/1#1"]
    begin, end = LEAK.index("HOW"), LEAK.index("ropewalk") + len("ropewalk")
    assert list(pieces.values()) == [LEAK[: begin - 20], LEAK[end + 20 :]]
    rows = read_table(out, "documents").to_pylist()
    assert [json.loads(row["metadata"]) for row in rows] == [
        {"n": 1, "piece_start_characters": 0},
        {"n": 1, "piece_start_characters": end + 20},
    ]
    assert [row["num_bytes"] for row in rows] == [len(text.encode()) for text in pieces.values()]
    counts = read_artifact(out).counts
    assert (counts["num_in"], counts["num_cut"], counts["num_pieces"], counts["num_kept"]) == (1, 1, 2, 2)
    decontaminate.check(None, out)


def test_a_document_of_which_nothing_is_left_is_dropped(tmp_path):
    documents = {"web/1": QUESTION, "web/2": FILLER[0]}
    out = run(tmp_path, documents, remove="passage")
    counts = read_artifact(out).counts
    assert list(texts(out)) == ["web/2"]
    assert (counts["num_cut"], counts["num_pieces"], counts["num_dropped_contaminated"]) == (0, 0, 1)


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.text("aé ,\n", min_size=1, max_size=4), min_size=5, max_size=30),
    places=st.sets(st.integers(0, 25), min_size=1),
    margin=st.integers(0, 5),
)
def test_pieces_hold_no_removed_word_and_their_places(words, places, margin):
    text = "|".join(words)
    found = split_words(text)
    places = sorted(place for place in places if place + 3 <= len(found))
    if not places:
        return
    gone = {word for place in places for word in range(place, place + 3)}
    assert covered_words(np.array(places), 3) == len(gone)
    assert {word for begin, end in covered_spans(places, 3) for word in range(begin, end)} == gone
    pieces = remaining_pieces(text, places, ngram=3, margin=margin, min_piece=1)
    assert all(text[begin : begin + len(piece)] == piece for begin, piece in pieces)
    spans = [match.span() for match in re.finditer(r"[\w\u0300-\u036f]+", text)]
    kept = {place for begin, piece in pieces for place in range(begin, begin + len(piece))}
    for word in gone:
        begin, end = spans[word]
        assert not kept & set(range(begin - margin, end + margin))


def test_spans_that_touch_or_overlap_are_one():
    assert covered_spans([0, 3, 5, 10], 3) == [(0, 8), (10, 13)]


def test_spelling_does_not_hide_a_copy():
    one, other = "Café, déjà-VU ﬁne", "cafe\u0301 DE\u0301JA\u0300 vu\tfine"
    assert [normal_form(word) for word in split_words(one)] == ["café", "déjà", "vu", "fine"]
    words = WordHashes()
    assert ngram_hashes(words.of(one), 4) == ngram_hashes(words.of(other), 4)


@settings(deadline=None, max_examples=60)
@given(left=st.lists(st.sampled_from("abc"), max_size=8), right=st.lists(st.sampled_from("abc"), max_size=8))
def test_hashes_agree_exactly_where_ngrams_do(left, right):
    words = WordHashes()
    for n in (1, 2, 3):
        hashes = [ngram_hashes(words.of(" ".join(each)), n).tolist() for each in (left, right)]
        grams = [[tuple(each[i : i + n]) for i in range(len(each) - n + 1)] for each in (left, right)]
        assert [[a == b for b in hashes[1]] for a in hashes[0]] == [[a == b for b in grams[1]] for a in grams[0]]


@settings(deadline=None, max_examples=60)
@given(text=st.text("ab é\u0301,", max_size=60), piece=st.integers(1, 20))
def test_a_gigantic_text_has_the_words_of_its_pieces(text, piece):
    with pytest.MonkeyPatch.context() as patch:
        whole = WordHashes().of(text).tolist()
        patch.setattr(words_module, "_PIECE_CHARACTERS", piece)
        assert WordHashes().of(text).tolist() == whole
    assert len(whole) == len(split_words(text))


def test_predictions_of_evaluate_are_an_evaluation_set(tmp_path):
    folder = tmp_path / "evaluation"
    sample = {"sample_id": "passkey-1", "depth": 0.5, "num_documents": 1, "fact": "key value"}
    words = QUESTION.split()
    sample |= {"text_before": " ".join(words[:14]) + " ", "text_after": " " + " ".join(words[14:])}
    write_table(folder, "samples", samples_schema(), [sample])
    write_artifact(folder, Artifact(kind="predictions"))
    out = run(tmp_path, {"web/1": LEAK, "web/2": FILLER[2]}, sets={"earlier": folder})
    assert list(texts(out)) == ["web/2"]
    (row,) = read_table(out, "contaminated").to_pylist()
    assert (row["slot"], row["sample_id"], row["num_ngrams"]) == ("earlier", "passkey-1", 2)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Real files, of which one is a copy of part of another, in Tokens split into train and heldout."""
    root = tmp_path_factory.mktemp("encoded")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    documents = {f"lib/{path.name}": path.read_text() for path in sorted(stdlib.glob("[a-d]*.py"))}
    heldout_name = "lib/bisect.py"
    documents["copy/part.py"] = "# copied\n" + documents[heldout_name][400:1400]
    source = write_corpus(root / "documents", documents, shard_records=9)
    tokens = run_stage(
        encode, EncodeConfig(vocab_size=700, added_tokens=MARKERS), {"documents": source}, root / "encode"
    )
    for seed in range(200):
        config = SplitConfig(subset="heldout", heldout_fraction=0.1, seed=seed)
        if split.is_heldout(config, heldout_name, 10) and not split.is_heldout(config, "copy/part.py", 10):
            break
    parts = {
        subset: run_stage(
            split, config.model_copy(update={"subset": subset}), {"tokens": tokens}, root / f"split-{subset}"
        )
        for subset in ("train", "heldout")
    }
    return {"documents": source, "tokenizer": tokens, **parts}


def token_texts(folder, tokenizer):
    rows = read_table(folder, "tokens").to_pylist()
    return {row["doc_id"]: tokenizer.decode(row["input_ids"]) for row in rows}


def test_training_tokens_share_nothing_with_the_prompts_of_evaluation(encoded, tmp_path):
    inputs = {"tokens": encoded["train"], "heldout": encoded["heldout"], "tokenizer": encoded["tokenizer"]}
    out = run_stage(decontaminate, DecontaminateConfig(), inputs, tmp_path / "out")
    decontaminate.check(None, out)
    tokenizer = load_tokenizer(encoded["tokenizer"])
    before, after = token_texts(encoded["train"], tokenizer), token_texts(out, tokenizer)
    heldout = token_texts(encoded["heldout"], tokenizer)
    wanted = set().union(*(ngrams(text, 13) for text in heldout.values()))
    assert set(after) == {name for name, text in before.items() if not ngrams(text, 13) & wanted}
    assert "copy/part.py" in before and "copy/part.py" not in after and after
    # The prompts themselves, as `evaluate` builds them.
    info = read_artifact(encoded["tokenizer"]).tokenizer
    writer = episode_writer(EpisodeFormat(), tokenizer, info)
    table = read_table(encoded["heldout"], "tokens")
    haystack = Haystack([ids.values.to_numpy() for ids in table["input_ids"].combine_chunks()], info.eos_token_id)
    left = set().union(*(ngrams(text, 13) for text in after.values()))
    for index in range(30):
        task = Task(name="multikey", num_facts=4)
        sample = build_sample(
            task, 512, 0.5, index, seed=0, writer=writer, haystack=haystack, bos_token_id=info.bos_token_id
        )
        assert not ngrams(tokenizer.decode(sample.prompt_ids), 13) & left


def test_heldout_documents_leave_the_documents_that_they_came_from(encoded, tmp_path):
    inputs = {name: encoded[name] for name in ("documents", "heldout", "tokenizer")}
    out = run_stage(decontaminate, DecontaminateConfig(), inputs, tmp_path / "out")
    counts = read_artifact(out).counts
    heldout = read_artifact(encoded["heldout"]).counts["num_kept"]
    assert counts["num_dropped_evaluation_document"] == heldout > 0
    assert counts["num_kept"] + heldout + counts["num_dropped_contaminated"] == counts["num_in"]
    assert not set(texts(out)) & {row["doc_id"] for row in read_table(encoded["heldout"], "tokens").to_pylist()}


def test_slots_that_do_not_fit_are_named(encoded, tmp_path):
    config = DecontaminateConfig()

    def attempt(name, config=config, **inputs):
        run_stage(decontaminate, config, inputs, tmp_path / name)

    documents, train, heldout = encoded["documents"], encoded["train"], encoded["heldout"]
    with pytest.raises(ValueError, match="either slot `documents` or slot `tokens`"):
        attempt("1", documents=documents, tokens=train, heldout=heldout)
    with pytest.raises(ValueError, match="at least one evaluation set"):
        attempt("2", documents=documents)
    with pytest.raises(ValueError, match=r"slot 'heldout' holds tokens.*connect slot `tokenizer`"):
        attempt("3", documents=documents, heldout=heldout)
    with pytest.raises(ValueError, match="cuts texts: connect slot `documents`"):
        attempt("4", DecontaminateConfig(remove="passage"), tokens=train, heldout=heldout)
    with pytest.raises(ValueError, match=r"no sample of \['bench'\] has 13 words"):
        attempt("5", documents=documents, bench=questions(tmp_path / "short", {"bench/q": "a few words"}))
    other = run_stage(encode, EncodeConfig(vocab_size=300), {"documents": documents}, tmp_path / "other")
    with pytest.raises(ValueError, match="'heldout' was not encoded by the tokenizer of slot"):
        attempt("6", documents=documents, heldout=heldout, tokenizer=other)
    (tmp_path / "rows").mkdir()
    write_artifact(tmp_path / "rows", Artifact(kind="rows"))
    with pytest.raises(ValueError, match="holds rows: an evaluation set is one of documents, tokens, predictions"):
        attempt("7", documents=documents, bench=tmp_path / "rows")


def test_a_corpus_of_nothing_but_leaks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"every document is contaminated.*raise max_ngrams"):
        run(tmp_path, {"web/1": QUESTION, "web/2": QUESTION + " again"})


def test_the_cut_into_shards_changes_nothing_and_bytes_repeat(tmp_path):
    documents = {f"web/{n}": f"{FILLER[n]} {QUESTION if n % 3 else ''}" for n in range(9)}
    outs = {cut: run(tmp_path, documents, f"cut{cut}", shard_records=cut) for cut in (3, 4, 100)}
    assert texts(outs[3]) == texts(outs[4]) == texts(outs[100])
    reports = [read_table(out, "contaminated").to_pylist() for out in outs.values()]
    assert reports[0] == reports[1] == reports[2] and len(reports[0]) == 6
    assert file_bytes(run(tmp_path, documents, "again", shard_records=4)) == file_bytes(outs[4])


@pytest.mark.parametrize("fields", [{"ngram_words": 0}, {"max_overlap_fraction": 1.0}, {"remove": "word"}])
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        DecontaminateConfig(**fields)
