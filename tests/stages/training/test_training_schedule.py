"""The learning rate at the places that matter."""

import pytest

from ropewalk.stages.training.schedule import learning_rate


def at(step, **changes):
    settings = {"num_steps": 101, "peak": 2.0, "warmup_steps": 4, "min_fraction": 0.1}
    return learning_rate(step, **(settings | changes))


def test_it_rises_in_a_line_and_falls_in_a_cosine_to_the_fraction():
    assert [at(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert at(52) == pytest.approx(1.1)  # half-way: mean of 2.0 and 0.2
    assert at(100) == pytest.approx(0.2)
    assert all(at(step) > at(step + 1) for step in range(4, 100))


def test_short_runs_have_finite_rates():
    assert at(0, num_steps=1, warmup_steps=0) == 2.0
    assert at(0, num_steps=1, warmup_steps=1) == 2.0
    assert at(1, num_steps=2, warmup_steps=0) == pytest.approx(0.2)
