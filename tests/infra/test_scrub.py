"""Secrets are taken out; counts, vocabulary and ordinary text stay as they are."""

from __future__ import annotations

import pytest

from ropewalk.infra.scrub import HIDDEN, names_credential, scrub, scrub_text

CREDENTIALS = """
hf_token token HF_TOKEN MLFLOW_TRACKING_PASSWORD apiKey api-key aws_secret_access_key privateKey client_secret
db.password authToken credentials HUGGING_FACE_HUB_TOKEN
"""
ORDINARY = """
row_tokens num_tokens bos_token eos_token pad_token separator_token tokenizer token_id key keys added_tokens output_key
max_tokens secretary
"""


@pytest.mark.parametrize("key", CREDENTIALS.split())
def test_names_of_credentials_are_known(key: str) -> None:
    assert names_credential(key)
    assert scrub({"outer": [{key: "hunter2"}]}) == {"outer": [{key: HIDDEN}]}


@pytest.mark.parametrize("key", ORDINARY.split())
def test_names_of_ordinary_fields_are_left_alone(key: str) -> None:
    assert scrub({key: "<s>"}) == {key: "<s>"}
    assert scrub({key: 4096}) == {key: 4096}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pa55@host:5000/x", "https://***@host:5000/x"),
        ("postgresql+psycopg://me:pw@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
        ("s3://b/k?X-Amz-Signature=abc&part=1", "s3://b/k?X-Amz-Signature=***&part=1"),
        ("https://h/x?a=1&sig=abc%3D", "https://h/x?a=1&sig=***"),
        ("failed: hf_abcdefghijklmnopqrstuvwxyz01 was refused", "failed: *** was refused"),
        ("run with HF_TOKEN=abc --x", "run with HF_TOKEN=*** --x"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("a basic tokenizer that bearers understand", "a basic tokenizer that bearers understand"),
        ("mail me@example.org about git@github.com:x/y", "mail me@example.org about git@github.com:x/y"),
        ("s3://bucket/runs@2/data", "s3://bucket/runs@2/data"),
        ("sqlite:////tmp/a/mlflow.db", "sqlite:////tmp/a/mlflow.db"),
    ],
)
def test_secrets_inside_text(text: str, expected: str) -> None:
    assert scrub_text(text) == expected


def test_the_original_is_not_changed_and_other_types_pass_through() -> None:
    original = {"token": "x", "n": 1, "f": 0.5, "none": None, "on": True, "pair": ("a", "b")}
    cleaned = scrub(original)
    assert original["token"] == "x"
    assert cleaned == {"token": HIDDEN, "n": 1, "f": 0.5, "none": None, "on": True, "pair": ["a", "b"]}


def test_an_empty_credential_shows_that_none_was_set() -> None:
    assert scrub({"token": ""}) == {"token": ""}
