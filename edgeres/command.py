"""What every command shares: errors as exit statuses, --json and --quiet, the job that flags and recipe describe."""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from edgeres import progress
from edgeres.errors import EdgeresError
from edgeres.options import OPTIONS
from edgeres.recipe import AUTO, find_workspace, load_recipe

F = TypeVar("F", bound=Callable[..., Any])


CANNOT_WRITE = {errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


class Failure(click.ClickException):
    """An `EdgeresError` on its way out: cause, evidence, next step; no traceback."""

    def __init__(self, error: EdgeresError) -> None:
        super().__init__(error.cause)
        self.error = error
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        cause, evidence, hint = map(progress.printable, (self.error.cause, self.error.evidence, self.error.hint))
        click.secho(f"Error: {cause}", fg="red", err=True)
        for line in evidence.splitlines():
            click.echo(f"  {line}", err=True)
        if hint:
            click.echo(f"Next: {hint}", err=True)


class Commands(click.Group):
    """The one place where edgeres' errors become exit statuses; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        ctx.meta.setdefault("json", "--json" in ctx.args)  # a command that cannot be parsed does not come to say it
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if ctx.meta.pop("json"):  # once: a group lies in another
                path = error.ctx.command_path if error.ctx else ctx.command_path
                _print_json(EdgeresError(error.format_message(), hint=f"`{path} --help` says what it takes"))
            ctx.meta["json"] = False
            raise
        except EdgeresError as error:
            raise _failure(ctx, error) from error
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            denied = error.errno in (errno.EACCES, errno.EPERM)  # for reading too
            cause = f"cannot {'read or ' * denied}write {error.filename or 'a file'}"
            hint = f"{'see to the rights' if denied else 'make room'} there, or write elsewhere: {self._elsewhere(ctx)}"
            raise _failure(ctx, EdgeresError(cause, evidence=error.strerror or "", hint=hint)) from error

    def _elsewhere(self, ctx: click.Context) -> str:
        """How the command that failed can be told to write to another place."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        options = {name for option in command.params for name in option.opts} if command else set()
        ways = [f"with {name}" for name in ("-o", "--work", "--html", "--markdown", "--junit") if name in options]
        return ", ".join([*ways, "from another workspace"])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the flow, not of the alphabet


def _failure(ctx: click.Context, error: EdgeresError) -> Failure:
    """``error`` on its way out; under --json stdout has it too, as scripts read nothing else."""
    if ctx.meta.get("json"):
        _print_json(error)
    return Failure(error)


def _print_json(error: EdgeresError) -> None:
    click.echo(json.dumps({"error": {"cause": error.cause, "evidence": error.evidence, "next": error.hint}}))


def _note_json(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    """Remember --json before any other option is looked at, as that may be an error."""
    ctx.meta["json"] = value
    return value


def command_of(group: click.Group, *names: str, resumes: bool = False) -> Callable[[F], Any]:
    """A command of ``group`` with `OPTIONS` by name, --json and --quiet, called with ``show(value, *renderables)``.

    ``resumes``: what a Ctrl-C leaves is where the next call goes on, unless that is on a Ray cluster.
    """

    def decorate(function: F) -> Any:
        @functools.wraps(function)
        def wrapper(as_json: bool, quiet: bool, **kwargs: Any) -> Any:
            def show(value: Any, *renderables: Any) -> None:
                from edgeres.files import to_json

                if as_json:
                    click.echo(to_json(value, indent=1))
                else:
                    # a pipe has no width of its own: never cut a table to guess one
                    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
                    for item in renderables:
                        if isinstance(item, str):  # a path: nothing in it is markup, and it is never folded
                            click.echo(progress.printable(item))
                            continue
                        with console.capture() as captured:
                            console.print(item)
                        click.echo(progress.printable(captured.get()), nl=False)

            with progress.to(None if quiet else Console(stderr=True)):
                try:
                    return function(show=show, **kwargs)
                except KeyboardInterrupt:
                    if resumes and not kwargs.get("ray"):
                        progress.say("what is finished is kept: the same command goes on from there")
                    raise

        # the outermost decorator is the first line of --help
        decorated: Any = click.option("--quiet", is_flag=True, help="No progress on stderr.")(wrapper)
        decorated = click.option(
            "--json", "as_json", is_flag=True, is_eager=True, callback=_note_json, help="Result as JSON on stdout."
        )(decorated)
        for name in reversed(names):
            decorated = OPTIONS[name](decorated)
        return group.command(decorated.__name__.rstrip("_").replace("_", "-"))(decorated)

    return decorate


def job(recipe: Path | None = None, model: Path | None = None, skip_bad: bool = False, force: bool = False) -> Any:
    """Workspace, recipe and flags -> `job.Job`."""
    from edgeres.job import Job

    root = find_workspace(recipe.parent if recipe else Path.cwd())
    asked = load_recipe(root, recipe, click.get_current_context().meta.get("flags"))
    if asked.engine.target == AUTO:
        from edgeres import doctor

        target = doctor.detect(doctor.gather())
        progress.say(f"target auto is {target} here")
        asked = replace(asked, engine=replace(asked.engine, target=target))
    return Job(asked, root, model, skip_bad, force)
