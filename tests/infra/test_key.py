"""Identity of steps: what changes a key, and what must not."""

import enum
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, create_model

from ropewalk.infra.key import canonical_json, identity, sha256_hex, step_key
from ropewalk.infra.plan import Planner
from ropewalk.infra.step import Pipeline, Step
from ropewalk.infra.store import Store

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


def keys_of_hash_seeds(seeds):
    """The keys that processes with these hash seeds give to one identity full of sets and mappings."""
    code = (
        "from ropewalk.infra.key import *\nfrom pydantic import BaseModel\n"
        "class C(BaseModel):\n    tags: frozenset[str] = frozenset({'x','y','z','w'})\n"
        "    weights: dict[str, float] = {name: 0.5 for name in {'x','y','z','w'}}\n"
        "print(step_key(identity('s', 1, C(), {name: '1' for name in {'b', 'a', 'c'}}, {})))"
    )

    def key(seed):
        environment = {"PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return set(pool.map(key, seeds))


def test_keys_do_not_depend_on_the_hash_seed():
    assert len(keys_of_hash_seeds(range(40))) == 1


@pytest.mark.faults
def test_a_thousand_hash_seeds_give_one_key():
    assert len(keys_of_hash_seeds(range(1000))) == 1


@given(st.permutations(["count", "rate", "names", "inner"]), st.permutations(["a", "b", "c"]))
def test_the_order_of_fields_and_slots_does_not_change_the_key(fields, slots):
    kinds = {"count": (int, 3), "rate": (float, 0.5), "names": (tuple[str, ...], ("a",)), "inner": (Inner, Inner())}
    ordered = create_model("Ordered", **{name: kinds[name] for name in fields})
    sorted_ = create_model("Sorted", **dict(sorted(kinds.items())))
    inputs = {slot: slot.upper() for slot in slots}
    assert step_key(identity("s", 1, ordered(), inputs, {})) == step_key(
        identity("s", 1, sorted_(), dict(sorted(inputs.items())), {})
    )


finite = st.floats(allow_nan=False, allow_infinity=False)
settings_values = st.builds(
    Settings, count=st.integers(), inner=st.builds(Inner, rate=finite, names=st.lists(st.text()).map(tuple))
)


@given(settings_values, settings_values)
def test_configs_have_equal_keys_only_if_they_are_equal(one, other):
    same = one.model_dump_json() == other.model_dump_json()
    keys = [step_key(identity("s", 1, config, {}, {})) for config in (one, other)]
    assert (keys[0] == keys[1]) == same


class stage:  # noqa: N801
    NAME, VERSION = "stage", 1


IDENTITY_FIELDS = {"stage", "config", "inputs", "code_policy"}
EXECUTION_FIELDS = {name: kind for name, kind in get_type_hints(Step).items() if name not in IDENTITY_FIELDS}
"""Found, not listed: a field that is added to Step is tested as one that may not change the key."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.fixed_dictionaries({}, optional={n: st.from_type(kind) for n, kind in EXECUTION_FIELDS.items()}))
def test_how_a_step_is_executed_never_changes_its_key(tmp_path, changes):
    assert {"name", "resources", "worker_resources", "retries", "timeout_seconds"} <= EXECUTION_FIELDS.keys()
    step = Step("step", stage, Settings())
    planner = Planner(Pipeline("pipeline", (step,)), Store(tmp_path))
    assert planner.document(replace(step, **changes), {}, {}) == planner.document(step, {}, {})
