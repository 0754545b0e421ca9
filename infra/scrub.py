"""Takes secrets out of what is about to be recorded: configs, URIs, messages.

A value is replaced when its key names a credential (`hf_token`, `password`, `aws_secret_access_key`), when the text
has the form of a well-known credential (`hf_...`, `ghp_...`, `sk-...`, `AKIA...`, a JWT), and inside URIs (userinfo,
signing query parameters). Counts such as `row_tokens` and tokenizer entries such as `bos_token` are no secrets and
stay. A secret in free text that has none of these forms is not found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_CREDENTIAL_KEY = re.compile(
    r"(^|_)(secret|password|passwd|passphrase|credentials?|authorization|cookie|"
    r"api_?key|access_?key|secret_?key|private_?key|auth_?key|token)$"
)
# `<word>_token` with one of these words is a piece of a vocabulary.
_VOCABULARY_TOKEN = re.compile(
    r"(^|_)(bos|eos|pad|unk|sep|cls|mask|begin|end|separator|marker|anchor|special|added|sink|image|stop)_token$"
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|"
    r"AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
_AUTHORIZATION = re.compile(
    r"\b(authorization\s*[:=]\s*[\"']?(?:bearer\s+|basic\s+)?|bearer\s+(?=\S*\d))[\w.~+/=-]{8,}", re.IGNORECASE
)
_USERINFO = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:token|secret|signature|password|credential|key|sig)=)[^&\s'\"]+", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"\b(\w*(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)=)[^\s'\"&]+")


def scrub(value: Any, key: str = "") -> Any:
    """A copy of a JSON-like value in which secrets are `"***"`. `key` is the name under which the value is stored."""
    if isinstance(value, Mapping):
        return {name: scrub(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if value and names_credential(key):
        return HIDDEN
    return scrub_text(value)


def names_credential(key: str) -> bool:
    """Whether a string stored under this key is a credential. Dots, dashes and capitals separate words."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    words = re.sub(r"[^a-zA-Z0-9]+", "_", words).lower()
    return bool(_CREDENTIAL_KEY.search(words)) and not _VOCABULARY_TOKEN.search(words)


def scrub_text(text: str) -> str:
    """A text without URI userinfo, signing query parameters and things that have the form of a credential."""
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _ASSIGNMENT.sub(rf"\1{HIDDEN}", text)
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    return _SECRET_VALUE.sub(HIDDEN, text)
