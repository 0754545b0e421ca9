from hypothesis import given
from hypothesis import strategies as st

from ropewalk.infra.series import Series


def rates(reports):
    """Throughput of (time, done) reports of one attempt."""
    clock = iter([time for time, _ in reports])
    series = Series(lambda: next(clock))
    found = [series.throughput({"done": done, "total": 99, "unit": "data shards"}) for _, done in reports]
    return [(event["step"], event["metrics"]["progress/data_shards_per_second"]) for event in found if event]


def test_throughput_is_the_rate_since_the_last_point_at_most_every_five_seconds():
    assert rates([(0, 0), (2, 10), (5, 20), (6, 25), (11, 50)]) == [(20, 4.0), (50, 5.0)]


def test_what_was_done_before_the_first_report_is_not_counted():
    assert rates([(0, 70), (10, 80)]) == [(80, 1.0)]


def test_no_progress_is_no_point():
    assert rates([(0, 3), (10, 3), (20, 3)]) == []


def test_the_rate_of_a_new_attempt_begins_with_its_own_first_report():
    clock = iter([0, 10, 12, 20])
    series = Series(lambda: next(clock))
    progress = {"total": 99, "unit": "rows"}
    assert series.throughput({"done": 0, **progress}) is None
    assert series.throughput({"done": 50, **progress})["metrics"] == {"progress/rows_per_second": 5.0}
    series.begin()
    assert series.throughput({"done": 10, **progress}) is None
    assert series.throughput({"done": 26, **progress})["metrics"] == {"progress/rows_per_second": 2.0}


def metrics(step, about=None, **values):
    return {"type": "metrics", "metrics": values, "step": step, "about": about}


@given(
    num_steps=st.integers(1, 30),
    attempts=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=4),
)
def test_a_curve_over_attempts_that_resume_has_every_point_once_and_in_order(num_steps, attempts):
    series, curve, saved = Series(), [], 0
    for reached, checkpoint in [*attempts, (num_steps, 0)]:
        series.begin()
        for step in range(1, max(saved, min(reached, num_steps)) + 1):
            event = series.new_points(metrics(step, loss=step / 2))
            curve += [(step, event["metrics"]["loss"])] if event else []
        saved = max(saved, min(checkpoint, reached, num_steps))
    assert curve == [(step, step / 2) for step in range(1, num_steps + 1)]


def test_a_metric_that_is_new_is_kept_beside_one_that_is_known():
    series = Series()
    series.begin()
    series.new_points(metrics(3, loss=1.0))
    series.begin()
    assert series.new_points(metrics(3, loss=1.0, tokens=5)) == metrics(3, tokens=5)
    assert series.new_points(metrics(3, loss=1.0, about="model")) == metrics(3, loss=1.0, about="model")
    assert series.new_points(metrics(3, loss=1.0)) is None


def test_within_an_attempt_and_without_a_step_everything_is_kept():
    series = Series()
    series.begin()
    reports = [metrics(5, loss=1.0), metrics(4, loss=2.0), metrics(4, loss=3.0), metrics(None, count=1)]
    assert [series.new_points(report) for report in reports] == reports
    series.begin()
    assert series.new_points(metrics(None, count=1)) == metrics(None, count=1)


def test_reports_of_other_kinds_are_recorded_as_they_are():
    series = Series()
    event = {"type": "running", "pid": 1}
    assert series.to_record(event) == [event]
    assert series.to_record({"type": "progress", "done": 1, "total": 2, "unit": "rows"}) == []
    assert series.to_record(metrics(2, loss=1.0)) == [{**metrics(2, loss=1.0), "metric_step": 2}]
