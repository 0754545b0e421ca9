"""What a stage is given on Ray, as far as it needs no cluster."""

import os
from types import SimpleNamespace

import pytest

from ropewalk.infra.on_ray.context import RayContext, check_work_is_shared
from ropewalk.infra.step import Resources, UserError


def test_a_gang_that_cannot_see_its_scratch_folder_is_told_what_to_do(tmp_path):
    check_work_is_shared(tmp_path)
    with pytest.raises(UserError, match="ROPEWALK_SCRATCH, on a file system that they share"):
        check_work_is_shared(tmp_path / "elsewhere")


def process_of(item):
    return item, os.getpid()


class Doubler:
    def __call__(self, item):
        return 2 * item, os.getpid()


def context_of(tmp_path, **resources):
    task = SimpleNamespace(step="s", worker_resources=Resources(), resources=Resources(**resources))
    return RayContext(task, tmp_path, lambda event: None, lambda: False, None, None, 0.0)


def test_a_single_item_is_worked_on_in_the_process_that_would_wait_for_it(tmp_path):
    context = context_of(tmp_path)
    assert list(context.map(process_of, iter([7]))) == [(7, os.getpid())]
    assert list(context.map(Doubler, [7])) == [(14, os.getpid())]
    assert list(context.map(process_of, [])) == []


def test_a_single_item_goes_to_a_worker_that_has_what_this_process_lacks(tmp_path, monkeypatch):
    asked = []

    def require_room(who, wanted, *rest):
        asked.append(wanted)
        raise UserError("no room")

    monkeypatch.setattr("ropewalk.infra.on_ray.context.require_room", require_room)
    with pytest.raises(UserError, match="no room"):
        context_of(tmp_path, num_cpus=0).map(process_of, [7])
    with pytest.raises(UserError, match="no room"):
        context_of(tmp_path).map(process_of, [7], resources=Resources(num_gpus=1))
    assert asked == [Resources(), Resources(num_gpus=1)]
