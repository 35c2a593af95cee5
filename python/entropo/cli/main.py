"""`entropo-cli`: finds commands by name, loads each only when it is called, turns errors into two lines and a code."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from entropo import __version__
from entropo.errors import EntropoError

COMMANDS = {
    "demo": "the whole pipeline on built-in tasks, in about a minute",
    "doctor": "check this machine: extension, torch, sandbox, endpoint, disk",
    "rollout": "run the agent on tasks in sandboxes, k samples each, graded",
    "process": "turn trajectories into token files for sft, dpo, kto or verifier",
    "train": "train sft, dpo, kto or verifier from token files",
    "tts-score": "score candidates: execution signals into a candidate table",
    "tts-select": "pick one candidate per instance and say why",
}


class LazyGroup(click.Group):
    """Help needs names and one-liners only; a command's module is imported when the command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return getattr(importlib.import_module(f"entropo.cli.{name}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                error.message += f" Did you mean `{near[0]}`?"
            raise


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="entropo-cli")
def entropo_cli() -> None:
    """Train coding agents on whole trajectories without losing diversity, and pick the best of n."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 ok, 1 failed, 2 usage or config, 130 interrupted."""
    _load_dotenv()
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code: Any = entropo_cli.main(args=arguments, standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted", None, 130)
    except KeyboardInterrupt:
        _fail("interrupted", None, 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2 if isinstance(error, click.UsageError) else error.exit_code)
    except EntropoError as error:
        if debug:
            raise
        _fail(str(error), error.hint, error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}", "this is a defect of entropo; run again with --debug and report it", 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, hint: str | None, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint:  {hint}", err=True)
    sys.exit(code)


def _load_dotenv() -> None:
    if os.path.isfile(".env"):
        from dotenv import load_dotenv

        load_dotenv(".env")


if __name__ == "__main__":
    main()
