"""Stores of both kinds for the tests of this folder."""

from stores import elsewhere, kind_of_store, store_uri

__all__ = ["elsewhere", "kind_of_store", "store_uri"]
