"""The one error tree of the package: what went wrong, where, and what to do about it.

Holds no printing and no exit: the command line turns these into two lines and an exit code.
"""

from __future__ import annotations

from pathlib import Path


class EntropoError(Exception):
    """Base of every error a user can cause or fix.

    Args: message (what was found and what was expected), `file`, `line` (1-based) or `key` (the place), `hint` (what to do).
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.line = line
        self.key = key
        self.hint = hint

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        named = f"`{self.key}`: " if self.key else ""
        return f"{place}: {named}{self.message}" if place else f"{named}{self.message}"


class ConfigError(EntropoError):
    """A configuration file, an override or a flag is wrong."""

    exit_code = 2


class DataError(EntropoError):
    """An input file cannot be used, or an output cannot be written."""


class TemplateError(EntropoError):
    """A chat template or a tokenizer cannot do what was asked of it."""


class SelectionError(EntropoError):
    """A candidate table or a strategy is wrong."""


class SandboxError(EntropoError):
    """An environment could not be started, or was lost."""


class EndpointError(EntropoError):
    """A model endpoint failed in a way that retrying did not mend."""


class ExtensionError(EntropoError):
    """The Rust extension is missing or of another version."""


class InternalError(EntropoError):
    """A promise of ours was broken: always a defect, never the user's fault."""
