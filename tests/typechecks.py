"""Types are checked at every call by beartype, and where a function names arrays by jaxtyping's lengths as well.

The import hook of jaxtyping, which pyproject.toml switches on, puts a wrapper around every function. It makes one
letter mean one length throughout a call, and binds the arguments anew for that: a third of the time of this suite, and
for nothing where no array is named. Where one is, the first calls are checked and then one in ten: what runs in the
inner loop of an allocation is called some hundred thousand times, and hears nothing new.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from inspect import isclass
from itertools import count
from types import CodeType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

plain = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
with_lengths = jaxtyping.jaxtyped(typechecker=plain)

OFTEN, ONE_IN = 500, 10
"""So many calls of a function that names arrays are all checked; of those after them, one in so many."""

met: set[CodeType] = set()
"""Functions inside others that were decorated before: such a one is made anew at each call of the other, and wrapping
it each time takes longer than what most of them do. Only the first is checked."""


def install() -> None:
    """Put `checked` in the place of what the hook decorates with; before any module that is checked is imported."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked  # type: ignore[assignment]


def checked(thing: Any) -> Any:
    """A function that checks its types when it is called, or a dataclass that checks them when it is made."""
    if not isclass(thing):
        return _function(thing)
    if is_dataclass(thing):  # of any other class the hook has met the methods one by one
        thing.__init__ = _function(thing.__init__)  # type: ignore[misc]
    return thing


def _function(function: Callable[..., Any]) -> Callable[..., Any]:
    if "<locals>" in function.__qualname__:
        if function.__code__ in met:
            return function
        met.add(function.__code__)
    names = function.__globals__
    arrays = any(_is_array(hint, names) for hint in function.__annotations__.values())
    return _sampled(function) if arrays else plain(function)


def _sampled(function: Callable[..., Any]) -> Callable[..., Any]:
    check, calls = with_lengths(function), count()

    @wraps(check)
    def sampled(*arguments: Any, **options: Any) -> Any:
        call = next(calls)
        return (check if call < OFTEN or call % ONE_IN == 0 else function)(*arguments, **options)

    return sampled


def _is_array(hint: Any, names: Mapping[str, Any]) -> bool:
    """Whether a hint, written out or not, is or has a type of jaxtyping's, be it by another name."""
    if isinstance(hint, str):
        return any(_is_array(names.get(word), {}) for word in re.findall(r"\w+", hint))
    return getattr(hint, "__module__", None) == "jaxtyping" or any(_is_array(part, names) for part in get_args(hint))
