"""What is shipped with a pipeline file: it and the modules beside it that it imports."""

import pytest

from ropewalk.infra.jobs import bundle
from ropewalk.infra.step import UserError


def lay(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def shipped(folder, name="mine.py"):
    return [path.relative_to(folder).as_posix() for path in bundle.bundled_files(folder / name)]


def test_imports_are_followed_wherever_they_stand_and_nothing_else_is_taken(tmp_path):
    lay(
        tmp_path,
        mine_py="import json\nfrom lib import one\nimport lib.deep.two as two\ndef pipeline():\n    import late\n",
        late_py="from ropewalk.infra.step import Pipeline\n",
        lib__one_py="from . import three\nfrom .deep import four\n",
        lib__three_py="",
        lib__deep__two_py="from ..five import name\n",
        lib__deep__four_py="",
        lib__five_py="name = 1\n",
        lib__unused_py="",
        unused_py="",
        notes_txt="secret",
    )
    (tmp_path / "lib/__init__.py").write_text("")
    expected = ["late.py", "lib/__init__.py", "lib/deep/four.py", "lib/deep/two.py", "lib/five.py"]
    assert shipped(tmp_path) == [*expected, "lib/one.py", "lib/three.py", "mine.py"]


def test_modules_that_import_each_other_are_taken_once(tmp_path):
    lay(tmp_path, mine_py="import other\n", other_py="import mine\n")
    assert shipped(tmp_path) == ["mine.py", "other.py"]


def test_the_copy_is_laid_out_as_beside_the_file(tmp_path):
    lay(tmp_path / "here", mine_py="from lib import one\n", lib__one_py="x = 1\n")
    bundle.copy_bundle(tmp_path / "here/mine.py", tmp_path / "there")
    found = sorted(path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.py"))
    assert found == ["lib/one.py", "mine.py"]


@pytest.mark.parametrize("name", ["kernels", "ropewalk", "json", "numpy", "pydantic"])
def test_a_module_that_would_shadow_a_package_is_refused_by_name(tmp_path, name):
    lay(tmp_path, mine_py=f"import {name}\n", **{f"{name}_py": ""})
    with pytest.raises(UserError, match=rf"{name}\.py would shadow the package '{name}' on the cluster: rename it"):
        shipped(tmp_path)


def test_a_package_that_would_shadow_is_refused_even_for_one_of_its_modules(tmp_path):
    lay(tmp_path, mine_py="from kernels.attention import api\n", kernels__attention__api_py="")
    with pytest.raises(UserError, match="would shadow the package 'kernels'"):
        shipped(tmp_path)


def test_a_folder_of_that_name_that_is_not_imported_does_no_harm(tmp_path):
    lay(tmp_path, mine_py="import os\n", kernels__api_py="", numpy_py="")
    assert shipped(tmp_path) == ["mine.py"]


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_BYTES", 10)
    lay(tmp_path, mine_py="x = 'more than ten bytes'\n")
    with pytest.raises(UserError, match="install them as a package"):
        shipped(tmp_path)
