"""Objects in a folder: created once, replaced whole, listed while others come and go."""

import os
import threading

import pytest

from ropewalk.infra.objects import LocalObjects


@pytest.fixture
def objects(tmp_path):
    return LocalObjects(tmp_path)


def test_of_many_that_create_an_object_one_is_first_and_its_content_stays(objects):
    start, first = threading.Barrier(16), []

    def create(number):
        start.wait()
        if objects.create("a/b", f"content {number}".encode()):
            first.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == 1 and objects.read("a/b") == f"content {first[0]}".encode()
    assert [path.name for path in (objects.root / "a").iterdir()] == ["b"], "nothing is left of the others"


def test_readers_of_an_object_that_is_replaced_see_one_content_or_the_other(objects):
    contents = [bytes([digit]) * 100_000 for digit in b"abc"]
    objects.write("a", contents[0])
    ended = threading.Event()

    def replace():
        while not ended.is_set():
            for content in contents:
                objects.write("a", content)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(300):
            assert objects.read("a") in contents
    finally:
        ended.set()
        writer.join()


def test_a_file_that_is_removed_while_its_folder_is_listed_is_left_out(objects, monkeypatch):
    for name in ("gone", "stays"):
        objects.write(f"folder/{name}", b"12")
    list_folder = os.scandir

    class Listing(list):
        """Removes a file after it was listed."""

        def __init__(self, place):
            super().__init__(sorted(list_folder(place), key=lambda entry: entry.name))
            (objects.root / "folder" / "gone").unlink(missing_ok=True)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Listing)
    assert objects.sizes("folder") == {"stays": 2}


def test_objects_and_folders_are_removed_and_what_is_gone_stays_gone(objects):
    for name in ("a/1", "a/b/2", "c"):
        objects.write(name, b"x")
    for name in ("a", "c", "a", "never/was"):
        objects.remove(name)
    assert objects.names("") == [] and objects.names("a") == []


def test_a_link_to_a_folder_is_removed_and_not_what_it_leads_to(objects, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "file").write_text("x")
    (objects.root / "link").symlink_to(outside)
    assert objects.sizes("") == {}
    objects.remove("link")
    assert (outside / "file").exists() and not (objects.root / "link").exists()
