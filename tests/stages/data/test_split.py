import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import numbered_documents, run_stage, tokenizer_info, write_tokens

from ropewalk.stages.data import split
from ropewalk.stages.data.split import SplitConfig, is_heldout
from ropewalk.stages.schema import Artifact, read_artifact, read_table, tokens_schema, write_artifact, write_table


def config(subset, **fields):
    return SplitConfig(subset=subset, **{"heldout_fraction": 0.5, **fields})


def subsets(folder, tokens, **fields):
    return {
        subset: run_stage(split, config(subset, **fields), {"tokens": tokens}, folder / subset)
        for subset in ("train", "heldout")
    }


def documents_in(folder):
    return {row["doc_id"]: row["input_ids"] for row in read_table(folder, "tokens").to_pylist()}


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=12, max_size=40), seed=st.integers(0, 5), least=st.integers(1, 5))
def test_the_subsets_are_disjoint_and_together_everything(tmp_path_factory, lengths, seed, least):
    root = tmp_path_factory.mktemp("split")
    documents = numbered_documents([*lengths, *([50] * 20)])
    folders = subsets(root, write_tokens(root / "tokens", documents), min_heldout_tokens=least, seed=seed)
    train, heldout = documents_in(folders["train"]), documents_in(folders["heldout"])
    assert not set(train) & set(heldout)
    assert {**train, **heldout} == documents
    assert all(len(ids) >= least for ids in heldout.values())
    for subset, kept in (("train", train), ("heldout", heldout)):
        assert read_artifact(folders[subset], "tokens").counts == {
            "num_in": len(documents),
            "num_kept": len(kept),
            "num_other_subset": len(documents) - len(kept),
            "num_tokens_in": sum(map(len, documents.values())),
            "num_tokens": sum(map(len, kept.values())),
        }


def test_the_order_and_the_tokenizer_are_kept_and_its_folder_is_not(tmp_path):
    info = tokenizer_info(["<|key|>"])
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([5] * 30), info)
    (tokens / "tokenizer").mkdir()
    train = subsets(tmp_path, tokens)["train"]
    assert list(documents_in(train)) == sorted(documents_in(train))
    assert read_artifact(train).tokenizer == info
    assert not (train / "tokenizer").exists()
    assert read_table(train, "tokens").schema.equals(tokens_schema())


def test_a_document_keeps_its_side_whatever_else_is_in_the_corpus(tmp_path):
    few = numbered_documents([9] * 20)
    small = subsets(tmp_path / "small", write_tokens(tmp_path / "few", few))
    large = subsets(tmp_path / "large", write_tokens(tmp_path / "many", numbered_documents([9] * 60)))
    for subset in ("train", "heldout"):
        assert documents_in(small[subset]) == {n: i for n, i in documents_in(large[subset]).items() if n in few}


def test_shards_change_nothing(tmp_path):
    documents = numbered_documents([9] * 20)
    one = tmp_path / "one"
    write_table(
        one, "tokens", tokens_schema(), ({"doc_id": n, "source": "test", "input_ids": i} for n, i in documents.items())
    )
    write_artifact(one, Artifact(kind="tokens", tokenizer=tokenizer_info()))
    many = subsets(tmp_path / "many", write_tokens(tmp_path / "tokens", documents))
    for subset, folder in subsets(tmp_path / "few", one).items():
        assert read_table(folder, "tokens").equals(read_table(many[subset], "tokens"))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_fraction_is_of_the_long_enough_documents(fraction):
    chosen = config("heldout", heldout_fraction=fraction, min_heldout_tokens=10, seed=3)
    held = sum(is_heldout(chosen, f"d{number}", 10) for number in range(4000))
    # Four standard deviations of a binomial count.
    assert abs(held - 4000 * fraction) < 4 * (4000 * fraction * (1 - fraction)) ** 0.5
    assert not any(is_heldout(chosen, f"d{number}", 9) for number in range(4000))


def test_the_seed_chooses_other_documents():
    sides = [[is_heldout(config("heldout", seed=seed), f"d{n}", 1) for n in range(100)] for seed in (0, 1)]
    assert sides[0] != sides[1]


def test_an_empty_subset_is_an_error_that_names_the_settings(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([9] * 5))
    with pytest.raises(ValueError, match=r"heldout subset is empty: heldout_fraction 0.5 and min_heldout_tokens 10"):
        run_stage(split, config("heldout", min_heldout_tokens=10), {"tokens": tokens}, tmp_path / "out")
