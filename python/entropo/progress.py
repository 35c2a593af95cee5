"""Progress with ETA on stderr; silent when stderr is no terminal, under --quiet and under --json."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from entropo.summary import RunOptions


@contextlib.contextmanager
def track(description: str, total: int | None, options: RunOptions) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, description=None)`; `total=None` means unknown."""
    if options.quiet or options.json or not sys.stderr.isatty():
        yield lambda n=1, description=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)

        def advance(n: int = 1, description: str | None = None) -> None:
            bar.update(task, advance=n, **({"description": description} if description else {}))

        yield advance
