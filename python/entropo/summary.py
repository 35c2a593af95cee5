"""What a stage hands back to the command line: numbers for machines, text for people, and how to run it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunOptions:
    """The flags every stage shares. `quiet` hides progress and text, `resume` goes on after a kill."""

    dry_run: bool = False
    resume: bool = False
    quiet: bool = False
    json: bool = False
    verbose: int = 0


@dataclass(frozen=True)
class Summary:
    """One finished command. `data` goes to stdout under --json; `text` (rich renderables or str) is for people."""

    command: str
    data: dict[str, Any]
    text: list[Any] = field(default_factory=list)
    exit_code: int = 0
