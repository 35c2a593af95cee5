"""The options every command shares, and how a Summary is printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from entropo.summary import RunOptions, Summary


def stage_options(function: Callable[..., Summary]) -> Callable[..., int]:
    """Adds --dry-run --resume --json --quiet -v --debug; passes them on as `options: RunOptions`; prints the Summary."""

    @click.option("--dry-run", is_flag=True, help="Show the resolved config, counts and cost; write nothing.")
    @click.option("--resume", is_flag=True, help="Go on after an interruption; gives the same files.")
    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress, no text.")
    @click.option("--verbose", "-v", count=True, help="More on stderr; twice for more.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @functools.wraps(function)
    def command(*, dry_run: bool, resume: bool, as_json: bool, quiet: bool, verbose: int, debug: bool, **rest: Any) -> int:
        options = RunOptions(dry_run=dry_run, resume=resume, quiet=quiet, json=as_json, verbose=verbose)
        summary = function(options=options, **rest)
        report(summary, options)
        return summary.exit_code

    return command


def report(summary: Summary, options: RunOptions) -> None:
    """Prints one JSON object under --json, else the text for people (nothing under --quiet)."""
    if options.json:
        from entropo.durable import dump_json

        click.echo(dump_json({"command": summary.command, "exit_code": summary.exit_code, **summary.data}))
        return
    if options.quiet:
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for item in summary.text:
        console.print(item, markup=False) if isinstance(item, str) else console.print(item)
