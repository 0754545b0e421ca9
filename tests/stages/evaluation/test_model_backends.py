"""The Hugging Face backend against naive loops that run one token at a time through the bare model."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ropewalk.stages.evaluation.backends import HuggingFaceBackend, WindowReader
from ropewalk.stages.evaluation.scoring import exact_match, loss_documents, loss_records


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints["extended"]


@pytest.fixture(scope="module")
def backend(folder):
    return HuggingFaceBackend(folder)


@pytest.fixture(scope="module")
def prompts(info):
    return np.random.default_rng(3).integers(4, info.vocab_size, size=(5, 37)).tolist()


def naive_logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1].double().numpy()


def naive_continuation(folder, prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(naive_logits(folder, ids).argmax()))
    return ids[len(prompt) :]


def test_generation_is_greedy_and_equals_one_token_at_a_time(backend, folder, prompts):
    expected = [naive_continuation(folder, prompt, 4) for prompt in prompts[:2]]
    assert backend.generate(prompts[:2], 4) == expected
    assert backend.generate(prompts[:2], 1) == [ids[:1] for ids in expected]


def test_a_batch_gives_what_its_prompts_give_alone(backend, prompts):
    for num_tokens in (1, 3):
        assert backend.generate(prompts, num_tokens) == [backend.generate([p], num_tokens)[0] for p in prompts]
    alone = np.concatenate([backend.token_losses([prompt]) for prompt in prompts])
    np.testing.assert_allclose(backend.token_losses(prompts), alone, rtol=1e-4, atol=1e-5)


def test_token_losses_equal_a_naive_loop(backend, folder, prompts):
    prompt = prompts[0][:12]
    naive = []
    for end in range(1, len(prompt)):
        logits = naive_logits(folder, prompt[:end])
        naive.append(math.log(sum(math.exp(x) for x in logits)) - logits[prompt[end]])
    np.testing.assert_allclose(backend.token_losses([prompt])[0], naive, rtol=1e-4, atol=1e-5)


def test_our_attention_gives_the_losses_and_answers_of_torchs_own(backend, folder, prompts):
    stock = HuggingFaceBackend(folder, attention="sdpa")
    np.testing.assert_allclose(backend.token_losses(prompts), stock.token_losses(prompts), rtol=1e-4, atol=1e-5)
    assert backend.generate(prompts, 6) == stock.generate(prompts, 6)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 36, 37])
def test_reading_in_chunks_changes_no_loss(backend, folder, prompts, chunk_tokens):
    chunked = HuggingFaceBackend(folder, chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(chunked.token_losses(prompts), backend.token_losses(prompts), rtol=1e-4, atol=1e-5)


def test_an_end_mark_ends_an_answer(backend, folder, prompts, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    second = backend.generate(prompts[:1], 2)[0][1]
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": second}))
    first = backend.generate(prompts[:1], 4)[0]
    ended = HuggingFaceBackend(other).generate(prompts[:1], 4)[0]
    assert ended == first[: first.index(second) + 1] and len(ended) <= 2


def test_sampling_settings_in_the_folder_are_ignored(backend, folder, prompts, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    settings = {"do_sample": True, "temperature": 50.0, "repetition_penalty": 5.0, "max_length": 3}
    (other / "generation_config.json").write_text(json.dumps(settings))
    assert HuggingFaceBackend(other).generate(prompts, 4) == backend.generate(prompts, 4)


def test_a_checkpoint_that_lacks_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights.*up_proj"):
        HuggingFaceBackend(other)


def test_prompts_of_unequal_length_are_refused(backend, writer, prompts):
    for reader in (backend, WindowReader(writer, 10)):
        with pytest.raises(ValueError, match="one length"):
            reader.generate([prompts[0], prompts[1][:-1]], 1)
        with pytest.raises(ValueError, match="one length"):
            reader.token_losses([prompts[0], prompts[1][:-1]])


def test_losses_fall_into_their_buckets_and_the_begin_mark_is_no_target():
    class Counting:
        def token_losses(self, batch):
            # The loss of position p is p.
            return np.array([[float(position) for position in range(1, len(ids))] for ids in batch])

    rows = list(loss_records(Counting(), [[0] * 10], ["a"], [0, 2, 5, 10]))
    assert [(row["position_start"], row["num_tokens"], row["sum_nll"]) for row in rows] == [
        (0, 1, 1.0),
        (2, 3, 2.0 + 3 + 4),
        (5, 5, 5.0 + 6 + 7 + 8 + 9),
    ]


def test_a_model_that_gives_no_number_is_refused():
    class Broken:
        def token_losses(self, batch):
            return np.array([[1.0, float("nan")]])

    with pytest.raises(ValueError, match="document a is not finite"):
        list(loss_records(Broken(), [[0, 5, 6]], ["a"], [0, 3]))


def test_documents_for_the_loss_curve_do_not_depend_on_how_many_are_asked_for():
    documents = [np.zeros(size) for size in (10, 50, 60, 5, 70, 80)]
    names = [f"d{index}" for index in range(6)]
    two, eligible = loss_documents(documents, names, num_documents=2, num_tokens=50, seed=0)
    four, _ = loss_documents(documents, names, num_documents=9, num_tokens=50, seed=0)
    assert eligible == 4 and four[:2] == two and sorted(four) == [1, 2, 4, 5]
    orders = {
        tuple(loss_documents(documents, names, num_documents=9, num_tokens=50, seed=seed)[0]) for seed in range(9)
    }
    assert len(orders) > 1


def test_exact_match_wants_equal_ids_and_not_a_substring():
    assert exact_match([5, 6], [5, 6]) == 1.0
    assert exact_match([5, 6, 7], [5, 6]) == exact_match([5], [5, 6]) == exact_match([], [5]) == 0.0
