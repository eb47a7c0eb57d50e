"""The program `h2keep`.

Each command lives in a module of its own, which is imported when the command is asked for and not before: the commands
differ in what has to be installed for them, and `h2keep --help` stays quick.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

try:
    import click
except ModuleNotFoundError as error:
    if error.name != "click":
        raise
    raise SystemExit(
        "h2keep's commands need click, which is not installed: pip install 'h2keep[cli]', for the demo 'h2keep[demo]'"
    ) from None

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

#: The exit code of a program that Ctrl-C ended.
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a command is to be found: the object `name` of `h2keep.cli.<name>`."""

    name: str
    #: The extra of the package that holds what the command imports.
    extra: str
    #: For the list of commands.
    summary: str

    def load(self) -> click.Command:
        """Import it. Raises `click.ClickException` if something that it needs is not installed."""
        try:
            module = importlib.import_module(f"{__name__}.{self.name}")
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "h2keep"):
                raise
            raise click.ClickException(
                f"h2keep {self.name} needs {package}, which is not installed: pip install 'h2keep[{self.extra}]'"
            ) from None
        command: click.Command = getattr(module, self.name)
        return command


_COMMANDS = {
    entry.name: entry
    for entry in [
        _Entry("demo", "demo", "See a connection forgotten, and one kept alive, side by side."),
        _Entry("run", "cli", "Run a program as it is, with HTTP/2 connections that stay alive."),
    ]
}


class _Commands(click.Group):
    """The commands above, imported one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        return entry.load() if entry else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: Sequence[tuple[str, str]] = [(entry.name, entry.summary) for entry in _COMMANDS.values()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="h2keep", message="%(package)s %(version)s")
def main() -> None:
    """HTTP/2 connections that stay alive."""
