"""Credentials from `~/.aws`, as the tools of AWS read them."""

import os
import subprocess
import sys

import pytest
from object_store_server import ENVIRONMENT, new_bucket, object_store_server

from ropewalk.infra.remote.aws_profile import profile_credentials
from ropewalk.infra.step import UserError

FILE = "[default]\naws_access_key_id = of-default\naws_secret_access_key = s\n\n"
FILE += "[team]\naws_access_key_id = of-team\naws_secret_access_key = s\n"
WRITE_AND_READ = """
import sys
from ropewalk.infra.remote.object_store import open_objects
objects = open_objects(sys.argv[1])
objects.write("x", b"1")
print(objects.read("x"))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with two profiles, and nothing of AWS in the environment."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(FILE)
    (tmp_path / ".aws" / "config").write_text("[default]\nregion = eu-north-1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_the_default_profile_is_used_where_the_environment_names_no_keys(home):
    provider = profile_credentials()
    assert provider is not None
    assert provider()["access_key_id"] == "of-default" and provider.config == {"region": "eu-north-1"}


def test_the_environment_chooses_a_profile_and_its_own_keys_come_first(home, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "team")
    provider = profile_credentials()
    assert provider is not None and provider()["access_key_id"] == "of-team"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    assert profile_credentials() is None


def test_without_any_file_the_machines_role_counts(home):
    (home / ".aws" / "credentials").unlink()
    (home / ".aws" / "config").unlink()
    assert profile_credentials() is None


def test_an_unknown_profile_is_named(home, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "taem")
    with pytest.raises(UserError, match="taem"):
        profile_credentials()


def test_a_profile_without_boto3_says_what_to_install(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert profile_credentials() is None
    monkeypatch.setenv("AWS_PROFILE", "team")
    with pytest.raises(UserError, match=r"AWS_PROFILE is team, .* pip install boto3"):
        profile_credentials()


def test_a_store_opens_with_nothing_but_the_file(tmp_path):
    with object_store_server() as endpoint:
        bucket = new_bucket()
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws" / "credentials").write_text(FILE)
        environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
        environment |= {"HOME": str(tmp_path), "AWS_ENDPOINT_URL": endpoint}
        command = [sys.executable, "-c", WRITE_AND_READ, f"{bucket}/store"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "b'1'", done.stderr
