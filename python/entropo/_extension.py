"""Loads the Rust extension and refuses one of another version. Has no fallback."""

from __future__ import annotations

import importlib
from types import ModuleType

from entropo import __version__
from entropo.errors import ExtensionError

BUILD_COMMAND = "make build"


def load_core() -> ModuleType:
    """Returns `entropo._core`. Raises: ExtensionError with the command that builds it."""
    try:
        core = importlib.import_module("entropo._core")
    except ImportError as error:
        raise ExtensionError(
            f"the Rust extension entropo._core cannot be loaded ({error})", hint=f"build it with `{BUILD_COMMAND}`"
        ) from error
    if core.__version__ != __version__:
        raise ExtensionError(
            f"entropo._core is version {core.__version__}, the package is {__version__}",
            hint=f"rebuild it with `{BUILD_COMMAND}`",
        )
    return core
