"""Opening the store that a command was given."""

from __future__ import annotations

import sys

from ropewalk.infra.store import Store


def open_store(uri: str) -> Store:
    """The store, and a line on standard error if nobody answers at its address, which is tried for a minute.

    The address may be reached in another way (a proxy), or come back: this is no error yet. Raises UserError for a
    URI that is none.
    """
    store = Store(uri)
    if not store.is_local:
        from ropewalk.infra.remote.reachable import why_endpoint_silent

        reason = why_endpoint_silent(store.uri)
        if reason:
            sys.stderr.write(f"{reason}; trying for a minute\n")
            sys.stderr.flush()
    return store
