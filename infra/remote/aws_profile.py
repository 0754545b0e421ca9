"""Credentials for s3:// from `~/.aws` (profiles, single sign-on, assumed roles), read and renewed by boto3.

The client of `object_store` reads the environment and asks the machine for its role; the files are boto3's business.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ropewalk.infra.step import UserError

FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}


def profile_credentials() -> Any | None:
    """A credential provider for `obstore.store.S3Store`, None where the environment or the machine's role is to count.

    Keys in the environment come first, as everywhere with AWS. Raises UserError for a profile that AWS_PROFILE names
    and that is not there, and if it names one and boto3 is not installed.
    """
    profile = os.environ.get("AWS_PROFILE")
    if "AWS_ACCESS_KEY_ID" in os.environ or not (profile or any(map(_is_there, FILES))):
        return None
    try:
        from boto3 import Session
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if profile:
            raise UserError(f"AWS_PROFILE is {profile}, and profiles are read by boto3: pip install boto3") from None
        return None
    try:
        session = Session()
        return Boto3CredentialProvider(session) if session.get_credentials() else None
    except BotoCoreError as error:
        raise UserError(f"~/.aws: {error}") from None


def _is_there(variable: str) -> bool:
    return Path(os.environ.get(variable) or FILES[variable]).expanduser().is_file()
