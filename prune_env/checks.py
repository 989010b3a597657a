"""Checks of single values: each refuses what is not allowed, in one line that names the parameter."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any, TypeGuard


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The question after the closest known name, and a space; nothing where none is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def check_name(what: str, name: object, known: Collection[str]) -> None:
    """Refuse a name that is not known, naming the closest one."""
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown; {did_you_mean(name, known)}allowed: {', '.join(known)}")


def check_integer(what: str, value: object, *, least: int) -> None:
    """Refuse anything but an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} is {value!r}; an integer of at least {least} is allowed")


def epochs_of(what: str, value: object) -> int | float:
    """A length of fine-tuning: whole epochs as an integer, or the share of the images of a single pass below one."""
    if is_number(value) and (0 < value < 1 or (value >= 0 and value == int(value))):
        return value if value < 1 and value else int(value)
    raise ValueError(f"{what} is {value!r}; a whole number, or a share of one epoch in (0, 1) is allowed")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_budget(value: object) -> None:
    """Refuse what can be no budget of any network; whether it can be reached shows once the network is traced."""
    if not is_number(value) or value <= 0 or (value > 1 and value != int(value)):
        raise ValueError(f"budget is {value!r}; a share in (0, 1] or a whole number above 1 is allowed")


def check_range(span: tuple[Any, ...] | None) -> None:
    """Refuse a range that is not two rising shares."""
    if span is None:
        return
    if len(span) != 2 or not all(map(is_number, span)) or not 0 < span[0] <= span[1] <= 1:
        raise ValueError(f"budget_range is {span!r}; two rising shares in (0, 1] are allowed")
