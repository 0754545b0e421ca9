import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import BOS, run_stage, tokenizer_info

from ropewalk.stages.data import distinct, mix
from ropewalk.stages.data.distinct import DistinctNames
from ropewalk.stages.data.mix import MixConfig
from ropewalk.stages.data.quotas import largest_remainder
from ropewalk.stages.schema import (
    Artifact,
    read_artifact,
    read_table,
    rows_schema,
    shard_paths,
    write_artifact,
    write_table,
)

ROW = 8


def make_row(slot, number, *, attention="causal", loss_mask=False, position_ids=False, row_tokens=ROW):
    """A row of three pieces of two documents with one inserted token between them; ids tell slot and row apart."""
    ids = [BOS, *(100 + slot_number(slot) * 50 + number * 3 + place for place in range(row_tokens - 1))]
    segments = [
        {"doc_id": f"{slot}-source/d{number}", "start": 5, "num_tokens": 3, "row_start": 1},
        {"doc_id": "shared/d0", "start": number, "num_tokens": 1, "row_start": 5},
        {"doc_id": "shared/d0", "start": 0, "num_tokens": row_tokens - 6, "row_start": 6},
    ]
    row = {"row_id": f"r{number}", "input_ids": ids, "segments": segments, "attention": attention}
    if loss_mask:
        row["loss_mask"] = [place % 2 == 0 for place in range(row_tokens)]
    if position_ids:
        row["position_ids"] = list(range(row_tokens - 1, -1, -1))
    return row


def slot_number(slot):
    return ord(slot[0]) - ord("a")


def write_rows(folder, rows, *, shard_records=7, info=None, row_tokens=ROW):
    columns = {name: bool(rows) and name in rows[0] for name in ("loss_mask", "position_ids")}
    write_table(folder, "rows", rows_schema(**columns), rows, shard_records=shard_records)
    artifact = Artifact(kind="rows", tokenizer=info or tokenizer_info(), row_tokens=row_tokens)
    write_artifact(folder, artifact)
    return folder


def write_slots(root, sizes, **options):
    return {
        slot: write_rows(root / slot, [make_row(slot, number) for number in range(size)], **options)
        for slot, size in sizes.items()
    }


def mixed(folder, slots, **fields):
    return run_stage(mix, MixConfig(**fields), slots, folder)


def taken(out):
    """How many rows of each slot, and how often each row."""
    ids = read_table(out, "rows")["row_id"].to_pylist()
    return Counter(name.split("/")[0] for name in ids), Counter(name.split("#")[0] for name in ids)


SHARES = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1).filter(lambda d: any(d.values()))


@given(shares=SHARES, total=st.integers(0, 10_000))
def test_quotas_add_up_and_are_within_one_of_the_exact_share(shares, total):
    fractions = {name: share / sum(shares.values()) for name, share in shares.items()}
    quotas = largest_remainder(fractions, total)
    assert sum(quotas.values()) == total
    for name, share in shares.items():
        exact = Fraction(share * total, sum(shares.values()))
        assert abs(quotas[name] - exact) < 1 + Fraction(1, 10**6)
    assert largest_remainder(dict(reversed(fractions.items())), total) == quotas


def test_the_largest_remainders_are_served_first():
    # A textbook apportionment: exact quotas 4.7, 1.6, 1.58, 1.2, 0.6, 0.32.
    votes = {"yellow": 47, "white": 16, "red": 15.8, "green": 12, "blue": 6, "pink": 3.2}
    assert largest_remainder(votes, 10) == {"yellow": 5, "white": 2, "red": 1, "green": 1, "blue": 1, "pink": 0}
    assert largest_remainder({"b": 0.5, "a": 0.5}, 3) == {"b": 1, "a": 2}, "ties go by name"
    # As doubles, 0.35 lies further below its decimal than 0.15, and the tie would go to b.
    assert largest_remainder({"a": 0.35, "b": 0.15, "c": 0.5}, 10) == {"a": 4, "b": 1, "c": 5}


@pytest.mark.parametrize("shares", [{"a": -0.1, "b": 1.1}, {"a": 0.0}])
def test_impossible_shares_are_an_error(shares):
    with pytest.raises(ValueError, match="shares must not be negative, nor all zero"):
        largest_remainder(shares, 3)


@settings(max_examples=20, deadline=None)
@given(shares=SHARES, num_rows=st.integers(1, 60), seed=st.integers(0, 3))
def test_each_slot_gives_its_quota_and_no_row_twice(tmp_path_factory, shares, num_rows, seed):
    root = tmp_path_factory.mktemp("mix")
    fractions = {name: share / sum(shares.values()) for name, share in shares.items()}
    slots = write_slots(root, dict.fromkeys(shares, 60))
    out = mixed(root / "out", slots, fractions=fractions, num_rows=num_rows, seed=seed)
    by_slot, by_row = taken(out)
    assert by_slot == {name: quota for name, quota in largest_remainder(fractions, num_rows).items() if quota}
    assert set(by_row.values()) == {1}
    counts = read_artifact(out, "rows").counts
    assert counts == {
        "num_rows_in": 60 * len(shares),
        "num_rows_used": num_rows,
        "num_rows_unused": 60 * len(shares) - num_rows,
        "num_rows_repeated": 0,
        "num_rows": num_rows,
    }


def test_rows_keep_their_content(tmp_path):
    slots = write_slots(tmp_path, {"a": 20, "b": 20})
    out = mixed(tmp_path / "out", slots, fractions={"a": 0.5, "b": 0.5}, num_rows=30)
    table = read_table(out, "rows")
    assert table.schema.equals(rows_schema())
    for row in table.to_pylist():
        slot, name = row["row_id"].split("/")
        assert row == {**make_row(slot, int(name[1:])), "row_id": row["row_id"]}


def test_rows_are_drawn_and_shuffled_over_the_whole_output(tmp_path):
    slots = write_slots(tmp_path, {"a": 200, "b": 200})
    out = mixed(tmp_path / "out", slots, fractions={"a": 0.5, "b": 0.5}, num_rows=200)
    ids = read_table(out, "rows")["row_id"].to_pylist()
    halves = Counter(name[0] for name in ids[:100])
    # Hypergeometric: standard deviation 3.5 rows.
    assert 35 <= halves["a"] <= 65
    numbers = [int(name[3:]) for name in ids if name[0] == "a"]
    assert 30 <= sum(number >= 100 for number in numbers) <= 70, "the draw is not the first rows"
    assert 30 <= sum(b > a for a, b in pairwise(numbers)) <= 70, "nor in their order"


def test_the_seed_draws_other_rows(tmp_path):
    slots = write_slots(tmp_path, {"a": 50})
    outs = [mixed(tmp_path / str(seed), slots, fractions={"a": 1.0}, num_rows=20, seed=seed) for seed in (0, 1)]
    first, second = (set(read_table(out, "rows")["row_id"].to_pylist()) for out in outs)
    assert first != second


def test_shards_change_nothing(tmp_path, monkeypatch):
    fields = {"fractions": {"a": 0.3, "b": 0.7}, "num_rows": 40, "seed": 5}
    few = mixed(tmp_path / "few", write_slots(tmp_path / "1", {"a": 30, "b": 30}, shard_records=100), **fields)
    monkeypatch.setattr(mix, "_SHARD_TOKENS", 3 * ROW)
    monkeypatch.setattr(mix, "_MAX_OPEN", 4)
    many = mixed(tmp_path / "many", write_slots(tmp_path / "2", {"a": 30, "b": 30}, shard_records=4), **fields)
    assert [len(shard_paths(out, "rows")) for out in (few, many)] == [1, 14]
    assert read_table(few, "rows").equals(read_table(many, "rows"))
    assert read_artifact(few) == read_artifact(many)
    assert not list((tmp_path / "many/work").iterdir()), "scratch files stay behind"


def test_equal_inputs_give_equal_bytes_whatever_the_order_of_the_slots(tmp_path):
    slots = write_slots(tmp_path, {"a": 30, "b": 30})
    reverse = dict(reversed(slots.items()))
    one = mixed(tmp_path / "1", slots, fractions={"a": 0.3, "b": 0.7}, num_rows=25)
    two = mixed(tmp_path / "2", reverse, fractions={"b": 0.7, "a": 0.3}, num_rows=25)
    other = mixed(tmp_path / "3", slots, fractions={"a": 0.3, "b": 0.7}, num_rows=25, seed=1)
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in (one, two, other)]
    assert contents[0] == contents[1] != contents[2]


def test_too_few_rows_are_an_error_that_names_the_slot(tmp_path):
    slots = write_slots(tmp_path, {"a": 20, "b": 9})
    with pytest.raises(ValueError, match="mix wants 10 rows of 'b', which has 9"):
        mixed(tmp_path / "out", slots, fractions={"a": 0.5, "b": 0.5}, num_rows=20)


def test_repeats_are_even_named_and_counted(tmp_path):
    slots = write_slots(tmp_path, {"a": 20, "b": 4})
    out = mixed(tmp_path / "out", slots, fractions={"a": 0.5, "b": 0.5}, num_rows=20, allow_repeats=True)
    ids = read_table(out, "rows")["row_id"].to_pylist()
    assert len(set(ids)) == 20
    by_row = Counter(name.split("#")[0] for name in ids if name.startswith("b"))
    assert sorted(by_row.values()) == [2, 2, 3, 3]
    assert {name for name in ids if name.startswith("b/r0")} in ({"b/r0", "b/r0#1"}, {"b/r0", "b/r0#1", "b/r0#2"})
    counts = read_artifact(out).counts
    assert (counts["num_rows_used"], counts["num_rows_repeated"], counts["num_rows"]) == (14, 6, 20)


def test_a_slot_without_rows_cannot_repeat_them(tmp_path):
    slots = write_slots(tmp_path, {"a": 20, "b": 0})
    with pytest.raises(ValueError, match="wants 10 rows of 'b', which has 0"):
        mixed(tmp_path / "out", slots, fractions={"a": 0.5, "b": 0.5}, num_rows=20, allow_repeats=True)
    out = mixed(tmp_path / "none", slots, fractions={"a": 1.0, "b": 0.0}, num_rows=20)
    assert taken(out)[0] == {"a": 20}


def test_optional_columns_that_some_slots_lack_get_their_defaults(tmp_path):
    plain = write_rows(tmp_path / "a", [make_row("a", n, attention="document") for n in range(5)])
    full = write_rows(tmp_path / "b", [make_row("b", n, loss_mask=True, position_ids=True) for n in range(5)])
    out = mixed(tmp_path / "out", {"a": plain, "b": full}, fractions={"a": 0.5, "b": 0.5}, num_rows=10)
    table = read_table(out, "rows")
    assert table.schema.equals(rows_schema(loss_mask=True, position_ids=True))
    for row in table.to_pylist():
        slot, number = row["row_id"][0], int(row["row_id"][3:])
        expected = make_row("b", number, loss_mask=True, position_ids=True) if slot == "b" else make_row("a", number)
        if slot == "a":
            expected |= {"loss_mask": [False] + [True] * 7, "position_ids": list(range(8)), "attention": "document"}
        assert row == {**expected, "row_id": row["row_id"]}


def test_statistics_describe_the_mixture(tmp_path):
    a = write_rows(tmp_path / "a", [make_row("a", n, attention="document") for n in range(6)])
    b = write_rows(tmp_path / "b", [make_row("b", n) for n in range(4)])
    out = mixed(tmp_path / "out", {"a": a, "b": b}, fractions={"a": 0.6, "b": 0.4}, num_rows=10)
    report = json.loads((out / "statistics.json").read_text())
    assert report == read_artifact(out).details
    # Each row has 3 tokens of a document of its own, 3 of the shared one, and 2 that were inserted.
    assert report == {
        "inserted_fraction": 0.25,
        "num_documents": 11,
        "tokens_by_slot": {"a": 48, "b": 32},
        "tokens_by_source": {"a-source": 18, "b-source": 12, "shared": 30, "(inserted)": 20},
        "tokens_by_attention_policy": {"causal": 32, "document": 48},
    }


def test_rows_that_cannot_be_mixed_are_errors_that_name_the_slots(tmp_path):
    halves = {"fractions": {"a": 0.5, "b": 0.5}, "num_rows": 4}
    slots = write_slots(tmp_path, {"a": 5, "b": 5})
    longer = write_rows(tmp_path / "longer", [make_row("b", n, row_tokens=9) for n in range(5)], row_tokens=9)
    with pytest.raises(ValueError, match="'a' has row_tokens 8 and 'b' 9"):
        mixed(tmp_path / "1", {**slots, "b": longer}, **halves)
    other = write_rows(tmp_path / "other", [make_row("b", n) for n in range(5)], info=tokenizer_info(digest="1" * 64))
    with pytest.raises(ValueError, match="rows of one tokenizer, but 'a' and 'b'"):
        mixed(tmp_path / "2", {**slots, "b": other}, **halves)
    with pytest.raises(ValueError, match=r"input slots \['a', 'b', 'c'\], but fractions for \['a', 'b'\]"):
        mixed(tmp_path / "3", {**slots, "c": longer}, **halves)
    wrong = write_rows(tmp_path / "wrong", [make_row("b", n, row_tokens=9) for n in range(5)])
    with pytest.raises(ValueError, match="has a row of 9 tokens, not 8"):
        mixed(tmp_path / "4", {**slots, "b": wrong}, **halves)


@settings(deadline=None, max_examples=30)
@given(names=st.lists(st.sets(st.integers(0, 40), max_size=12), max_size=6), part=st.integers(1, 50))
def test_documents_are_counted_once_however_they_are_spread(names, part, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "_PART_NAMES", part)
        counted = DistinctNames(tmp_path_factory.mktemp("distinct") / "names")
        for some in names:
            counted.add(f"d{number}" for number in some)
        assert counted.count() == len(set().union(*names))


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_fractions_that_do_not_sum_to_one_are_refused_and_listed(fractions):
    with pytest.raises(ValidationError, match="fractions" if not fractions else str(fractions).replace("{", r"\{")):
        MixConfig(fractions=fractions, num_rows=1)
