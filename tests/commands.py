"""Parse a command line as the `textrec` command would, without running it."""

import shlex

import typer

from textrec.cli import app, spread


def parse(line: str) -> dict:
    """Return the parameters of `textrec ...`; raise the usage error that the command would print."""
    command, (_, *arguments) = typer.main.get_command(app), shlex.split(line, comments=True)
    arguments = list(spread(arguments))
    context = command.make_context("textrec", arguments)
    while hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        name, command, arguments = command.resolve_command(context, rest)
        context = command.make_context(name, arguments, parent=context)
    return context.params
