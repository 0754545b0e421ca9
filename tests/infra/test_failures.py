"""Errors are told apart by who can mend them; waits between attempts double, are capped and differ."""

import errno
from concurrent.futures.process import BrokenProcessPool
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.infra.failures import Tries, classify
from ropewalk.infra.step import Retries, UserError
from ropewalk.infra.store import StoreError


class AnswerError(Exception):
    """As HTTP clients raise them."""

    def __init__(self, status_code):
        super().__init__(f"status {status_code}")
        self.status_code = status_code


def named(name, base=Exception, text=""):
    """An error of a library that is not loaded here."""
    return type(name, (base,), {})(text)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), "user"),
        (TypeError("x"), "user"),
        (KeyError("x"), "user"),
        (ZeroDivisionError("x"), "user"),
        (UserError("x"), "user"),
        (StoreError("x"), "user"),
        (RuntimeError("anything else"), "user"),
        (MemoryError(), "user"),
        (named("OutOfMemoryError", RuntimeError, "CUDA out of memory"), "user"),
        (OSError(errno.ENOSPC, "No space left on device"), "user"),
        (OSError(errno.EACCES, "Permission denied"), "user"),
        (FileNotFoundError(errno.ENOENT, "x"), "user"),
        (OSError(errno.EHOSTUNREACH, "x"), "infrastructure"),
        (OSError(errno.ESTALE, "x"), "infrastructure"),
        (TimeoutError("x"), "infrastructure"),
        (ConnectionResetError("x"), "infrastructure"),
        (BrokenProcessPool("rank 1 died"), "infrastructure"),
        (named("ReadTimeout"), "infrastructure"),
        (named("WorkerCrashedError"), "infrastructure"),
        (named("DistBackendError", RuntimeError), "infrastructure"),
        (AnswerError(503), "infrastructure"),
        (AnswerError(429), "infrastructure"),
        (AnswerError(404), "user"),
        (KeyboardInterrupt(), "cancelled"),
        (caused(RuntimeError("rank 0 failed"), ConnectionResetError("x")), "infrastructure"),
        (caused(ValueError("bad answer"), ConnectionResetError("x")), "user"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__} {value}",
)
def test_an_error_has_a_kind(error, kind):
    assert classify(error) == kind


def test_errors_of_ray_have_kinds():
    from ray.exceptions import (
        ActorDiedError,
        NodeDiedError,
        OutOfMemoryError,
        RayTaskError,
        TaskCancelledError,
        WorkerCrashedError,
    )

    assert classify(WorkerCrashedError()) == "infrastructure"
    assert classify(NodeDiedError("the node is gone")) == "infrastructure"
    assert classify(ActorDiedError()) == "infrastructure"
    assert classify(OutOfMemoryError("the node ran out of memory")) == "user"
    assert classify(TaskCancelledError()) == "cancelled"
    assert classify(RayTaskError("f", "traceback", ValueError("x"))) == "user"
    assert classify(RayTaskError("f", "traceback", ConnectionError("x"))) == "infrastructure"


def test_a_loop_of_causes_ends():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) == "user"


@given(st.integers(0, 2**32), st.floats(0.01, 10), st.floats(0.01, 100), st.integers(2, 12))
def test_waits_double_up_to_the_cap_and_lose_at_most_half_of_themselves(seed, base, cap, attempts):
    tries = Tries(Retries(attempts, 10, base, cap), Random(seed))
    waits = [tries.again_in("infrastructure") for _ in range(attempts)]
    assert waits.pop() is None, "the last attempt has no successor"
    for number, wait in enumerate(waits):
        whole = min(cap, base * 2**number)
        assert whole / 2 <= wait <= whole


def test_steps_that_fail_together_do_not_come_back_together():
    waits = {Tries(Retries(), Random(seed)).again_in("infrastructure") for seed in range(20)}
    assert len(waits) == 20


def test_the_users_errors_are_not_tried_again():
    for kind in ("user", "cancelled"):
        assert Tries(Retries(), Random(0)).again_in(kind) is None


def test_preemptions_have_a_count_and_a_limit_of_their_own():
    tries = Tries(Retries(max_attempts=2, max_preemptions=3), Random(0))
    assert all(tries.again_in("preempted") is not None for _ in range(3))
    assert (tries.failed, tries.preempted) == (0, 3)
    assert tries.again_in("infrastructure") is not None
    assert tries.again_in("preempted") is None
    assert tries.again_in("infrastructure") is None
    assert (tries.failed, tries.preempted) == (2, 4)
