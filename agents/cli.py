"""What the commands share: one line for bad input, exit codes, and arguments from a signature."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress

BAD_INPUT, INTERRUPTED = 2, 130


def parse(target: Callable[..., Any], arguments: list[str], *, program: str, default: Any = None) -> Any:
    """Arguments by a signature; `--help` prints and exits.

    Args:
        target: A dataclass or a function.
        arguments: Words of the command line.
        program: The command, for the help.
        default: An instance of the dataclass, whose values stand where none is given.

    Raises:
        ValueError: They do not fit, in one line.
    """
    said, given = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, args=arguments, prog=program, description=target.__doc__, **given)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def guarded(command: Callable[[], int]) -> int:
    """Run a command; bad input becomes one line on stderr and exit code 2."""
    try:
        return command()
    except (ValueError, OSError, ArithmeticError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {line}\n")
        return BAD_INPUT


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Callable[..., None]]:
    """A bar for whatever is under way, told as (done, total, what)."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("preparing", total=None)

        def tell(done: int, total: int, what: str = "training") -> None:
            progress.update(line, completed=done, total=total, description=what)

        yield tell


def _one_line(text: str) -> str:
    """The message inside the box that tyro draws, without its title and help."""
    lines = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]|-{4,}", "", text).splitlines()[1:]
    words = " ".join(" ".join(line.strip(" +|") for line in lines).split())
    message = re.split(r"For full helptext|Argument helptext|Full helptext", words)[0].strip()
    return message.removeprefix("Error parsing config:").strip() or "bad arguments; see --help"
