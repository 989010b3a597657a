"""Trust: which classes and functions a network file may name. A file is data; it must not choose what code runs.

A name is `module:qualified name`. It is resolved only where networks live, and only to what a network is made of:
module classes, and functions on tensors. torch as a whole is not trusted: it also holds functions that read files,
download, compile and run commands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CLASSES = ("torch.nn.modules", "torchvision.models", "torchvision.ops", "torchvision.transforms", "prune_env")
"""Packages whose module classes may be named, and imported."""
FUNCTIONS = ("torchvision.ops", "prune_env.tasks.networks")
"""Packages whose functions may be named, besides torch's own (`tensor_functions`)."""


@cache
def tensor_functions() -> dict[str, Any]:
    """Torch's functions on tensors by name: `torch.nn.functional`, and whatever `torch` shares with `Tensor`."""
    callables = (FunctionType, BuiltinFunctionType)
    found = {}
    for name, value in vars(functional).items():
        home = getattr(value, "__module__", None)
        if isinstance(value, callables) and home in ("torch.nn.functional", "torch._C._nn", "torch") and name[0] != "_":
            found[f"torch.nn.functional:{name}"] = value
    for name, value in vars(torch).items():
        if isinstance(value, BuiltinFunctionType) and hasattr(torch.Tensor, name) and name[0] != "_":
            found[f"torch:{name}"] = value
    return found


@cache
def _tensor_function_names() -> dict[int, str]:
    return {id(value): name for name, value in reversed(tensor_functions().items())}


def name_of(value: Any) -> str:
    """The name under which a class or function is found again.

    Raises:
        ValueError: There is none: it is a lambda, or was defined inside a function or made at run time.
    """
    known = _tensor_function_names().get(id(value))
    if known is not None:
        return known
    module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found = _member(sys.modules.get(module), qualified) if module and qualified else None
    if module is None or found is not value:
        raise ValueError(f"{value!r} cannot be found again by name; define it at the top level of a module")
    _refuse_standard_library(module)
    return f"{module}:{qualified}"


def resolve_class(name: Any, allow: Sequence[str]) -> type[nn.Module]:
    """The module class of that name.

    Args:
        name: `module:qualified name`.
        allow: Packages trusted on top of `CLASSES`. Modules that the caller has imported (none of torch) are
            trusted too, for module classes only.

    Raises:
        ValueError: It is not trusted, or does not exist, or is not a subclass of `nn.Module`.
    """
    module, qualified = _split(name)
    loaded = sys.modules.get(module)
    if _inside(module, (*CLASSES, *allow)):
        loaded = _imported(module)
    elif loaded is None or _inside(module, ("torch", "torchvision")):
        raise ValueError(f"class {name!r} is not trusted; {_advice(module, 'import its module first, or ')}")
    value = _member(loaded, qualified)
    if not (isinstance(value, type) and issubclass(value, nn.Module) and _is_named(value, module, qualified)):
        raise ValueError(f"{name!r} is not a subclass of torch.nn.Module")
    return value


def resolve_function(name: Any, allow: Sequence[str]) -> Any:
    """The function of that name (with `allow`, any class too).

    Raises:
        ValueError: It is not trusted, or does not exist, or is not a function.
    """
    module, qualified = _split(name)
    if name in tensor_functions():
        return tensor_functions()[name]
    if not _inside(module, (*FUNCTIONS, *allow)):
        raise ValueError(f"{name!r} is not trusted; {_advice(module, '')}")
    value = _member(_imported(module), qualified)
    kinds = (FunctionType, BuiltinFunctionType, type) if _inside(module, allow) else (FunctionType,)
    if not (isinstance(value, kinds) and _is_named(value, module, qualified)):
        raise ValueError(f"{name!r} is not a function defined there")
    return value


def _split(name: Any) -> tuple[str, str]:
    module, _, qualified = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not all(part.isidentifier() for part in (*module.split("."), *qualified.split("."))):
        raise ValueError(f"{name!r} does not name a class or function (module:name)")
    _refuse_standard_library(module)
    return module, qualified


def _refuse_standard_library(module: str) -> None:
    root = module.split(".")[0]
    if root in sys.stdlib_module_names:
        raise ValueError(f"{module!r} is Python's own library: what it holds is no part of a network")


def _inside(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _imported(module: str) -> ModuleType:
    # Importing a package's __main__ would run its program.
    if "__main__" in module.split(".") and module not in sys.modules:
        raise ValueError(f"module {module!r} is a program and is not imported")
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"module {module!r} cannot be imported: {error}") from None


def _member(module: ModuleType | None, qualified: str) -> Any:
    value: Any = module
    for part in qualified.split("."):
        value = getattr(value, part, None)
    return value


def _is_named(value: Any, module: str, qualified: str) -> bool:
    """Whether the value was defined under this very name: nothing is reached through another module's imports."""
    return (getattr(value, "__module__", None), getattr(value, "__qualname__", None)) == (module, qualified)


def _advice(module: str, first: str) -> str:
    return f"if you know it and trust it, {first}pass allow=({module!r},)"
