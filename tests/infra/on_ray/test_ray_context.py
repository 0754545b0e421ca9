"""What a stage is given on Ray, as far as it needs no cluster."""

import pytest

from ropewalk.infra.on_ray.context import check_work_is_shared
from ropewalk.infra.step import UserError


def test_a_gang_that_cannot_see_its_scratch_folder_is_told_what_to_do(tmp_path):
    check_work_is_shared(tmp_path)
    with pytest.raises(UserError, match="ROPEWALK_SCRATCH, on a file system that they share"):
        check_work_is_shared(tmp_path / "elsewhere")
