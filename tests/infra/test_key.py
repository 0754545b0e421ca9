"""Identity of steps: what changes a key, and what must not."""

import enum
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from ropewalk.infra.key import canonical_json, identity, sha256_hex, step_key

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "keys.json").read_text())


class Colour(enum.Enum):
    RED = "red"


class Inner(BaseModel):
    rate: float = 0.5
    names: tuple[str, ...] = ("a", "b")


class Settings(BaseModel):
    count: int = 3
    inner: Inner = Inner()
    colour: Colour = Colour.RED


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_canonical_json_reads_back_as_the_same_value(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), max_size=6))
def test_key_order_does_not_change_canonical_json(value):
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_ints_and_floats_are_distinct():
    assert canonical_json(1) != canonical_json(1.0)


def test_sets_are_sorted():
    assert canonical_json({"b", "a"}) == '["a","b"]'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("/x"), b"x", object(), {1: 2}, lambda: 0])
def test_values_without_a_canonical_form_are_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"settings\.deep"):
        canonical_json({"settings": {"deep": value}})


def test_every_identity_field_changes_the_key():
    def key(**changes):
        base = {"stage": "s", "version": 1, "config": Settings(), "inputs": {"a": "1"}, "externals": {"e": "2"}}
        return step_key(identity(**{**base, **changes}))

    variants = [
        key(),
        key(stage="t"),
        key(version=2),
        key(config=Settings(count=4)),
        key(config=Settings(inner=Inner(rate=0.25))),
        key(inputs={"a": "3"}),
        key(inputs={"b": "1"}),
        key(inputs={}, externals={"a": "1", "e": "2"}),
        key(externals={"e": "4"}),
        key(code_digest="c"),
    ]
    assert len(set(variants)) == len(variants)


def test_defaults_are_resolved_before_the_key_is_made():
    assert step_key(identity("s", 1, Settings(), {}, {})) == step_key(identity("s", 1, Settings(count=3), {}, {}))


def test_keys_equal_the_committed_golden_vectors():
    for vector in GOLDEN:
        assert sha256_hex(canonical_json(vector["document"])) == vector["key"]


def test_keys_do_not_depend_on_the_hash_seed():
    code = (
        "from ropewalk.infra.key import *\nfrom pydantic import BaseModel\n"
        "class C(BaseModel):\n    tags: frozenset[str] = frozenset({'x','y','z','w'})\n"
        "print(step_key(identity('s', 1, C(), {'b': '2', 'a': '1'}, {})))"
    )
    keys = set()
    for seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        keys.add(done.stdout)
    assert len(keys) == 1
