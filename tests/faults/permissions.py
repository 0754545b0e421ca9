"""Permission bits that bind the superuser too, as whom tests run in many containers."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

VERSION_3 = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2
"""Capabilities to read and write whatever the bits say: capabilities(7)."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def permissions_that_bind() -> Iterator[None]:
    """Permission bits bind this thread, and the threads it starts, until the block ends.

    Becoming another user would do as well, were there no folders that this user cannot enter, such as a clone's.
    """
    before = _capabilities("capget", (_Data * 2)())
    bound = (_Data * 2).from_buffer_copy(before)
    bound[0].effective &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    _capabilities("capset", bound)
    try:
        yield
    finally:
        _capabilities("capset", before)


def _capabilities(call: str, data: ctypes.Array[_Data]) -> ctypes.Array[_Data]:
    """Read (capget) or set (capset) those of this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(ctypes.byref(_Header(VERSION_3, 0)), data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), call)
    return data
