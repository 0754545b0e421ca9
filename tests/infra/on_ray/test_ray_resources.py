"""What processes need in Ray's names and in words, and what is asked of Ray that it may not offer."""

import pytest

from ropewalk.infra.on_ray.resources import draining_nodes, in_words, ray_needs, ray_options
from ropewalk.infra.step import Resources


@pytest.mark.parametrize(
    ("resources", "num_processes", "text"),
    [
        (Resources(num_gpus=1, memory_gib=2), 2, "2 workers with 1 CPU, 1 GPU, 2 GiB of memory each"),
        (Resources(num_cpus=0, custom={"seat": 0.5}), 1, "1 worker with 0.5 seat"),
        (Resources(num_cpus=0), 3, "3 workers"),
    ],
)
def test_needs_in_words(resources, num_processes, text):
    assert in_words(resources, num_processes) == text


def test_needs_in_rays_names():
    resources = Resources(num_cpus=2, num_gpus=1, memory_gib=0.5, custom={"tpu": 4})
    assert ray_needs(resources) == {"CPU": 2, "GPU": 1, "memory": 2**29, "tpu": 4}
    assert ray_options(resources) == {"num_cpus": 2, "num_gpus": 1, "memory": 2**29, "resources": {"tpu": 4}}


def test_a_ray_that_does_not_tell_which_nodes_drain_is_good_enough(monkeypatch):
    monkeypatch.delattr("ray._private.state.GlobalState.get_draining_nodes")
    assert draining_nodes() == set()
