"""`h2keep run -- CMD`: a program as it is, with HTTP/2 connections that stay alive.

The program is exec'ed, so that its arguments, its exit code and its signals are its own. All that it gets is a
directory first on PYTHONPATH, whose `sitecustomize.py` does the rest in every Python that starts with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from h2keep import _install

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["run"]

_SITE = str(Path(__file__).with_name("_site"))
#: As a shell has it.
_NOT_FOUND = 127
_NOT_EXECUTABLE = 126


def _checked(check: Callable[[str, str], object], variable: str) -> Callable[..., str | None]:
    """A click callback: the option's value, else the variable's, checked."""

    def callback(_context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
        name = parameter.opts[0]
        if value is None:
            name, value = variable, os.environ.get(variable) or None
        if value is not None:
            try:
                check(value, name)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
        return value

    return callback


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--read-idle-timeout",
    metavar="SECONDS",
    callback=_checked(_install.seconds, _install.READ_IDLE_TIMEOUT),
    help=f"A PING goes out after so long a silence, while a request is open. Default: {_install.READ_IDLE_TIMEOUT}, "
    "else 30.",
)
@click.option(
    "--ping-timeout",
    metavar="SECONDS",
    callback=_checked(_install.seconds, _install.PING_TIMEOUT),
    help=f"A connection is given up after so long without life after a PING. Default: {_install.PING_TIMEOUT}, "
    "else 15.",
)
@click.option(
    "--log",
    metavar="LEVEL",
    callback=_checked(_install.log_level, _install.LOG),
    help=f"Write h2keep's log to standard error: {', '.join(_install.LOG_LEVELS)}. Default: {_install.LOG}, else none "
    "of its own.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], read_idle_timeout: str | None, ping_timeout: str | None, log: str | None) -> None:
    """Run COMMAND as it is, with HTTP/2 connections that stay alive.

    The transports that httpx and httpx2 make in it, and in its child processes, are h2keep's. Write -- before a command
    with options:

        h2keep run --ping-timeout 10 -- python -u app.py --port 80
    """
    settings = {_install.READ_IDLE_TIMEOUT: read_idle_timeout, _install.PING_TIMEOUT: ping_timeout, _install.LOG: log}
    sys.stdout.flush()
    try:
        _become(command, _environment(os.environ, settings))
    except OSError as error:
        click.echo(f"h2keep run: {command[0]}: {error.strerror}", err=True)
        sys.exit(_NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE)


def _environment(environment: Mapping[str, str], settings: Mapping[str, str | None]) -> dict[str, str]:
    path = [
        _SITE,
        *(entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", _SITE)),
    ]
    given = {name: value for name, value in settings.items() if value is not None}
    return {**environment, **given, "PYTHONPATH": os.pathsep.join(path)}


def _become(command: tuple[str, ...], environment: dict[str, str]) -> Any:
    if sys.platform == "win32":
        # There exec makes a new process, and whoever waits for this one goes on.
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    os.execvpe(command[0], command, environment)
