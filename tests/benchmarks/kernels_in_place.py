"""Imported, it makes `ropewalk.kernels` importable from the folders of the repository where it is not installed."""

import sys
import types
from importlib import import_module
from pathlib import Path

try:
    import_module("ropewalk.kernels.attention")
except ImportError:
    sys.modules["ropewalk"] = package = types.ModuleType("ropewalk")
    package.__path__ = [str(Path(__file__).parents[2])]
