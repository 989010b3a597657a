"""The blueprint: a network as plain data (classes by name, attributes, wiring) beside a table of its tensors.

Building from it calls no constructor and no code of the file's choosing: empty modules of trusted classes are made
and filled. What the data cannot say is refused when it is written, by module and attribute.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_env.pruning.trust import name_of, resolve_class, resolve_function

OWN = frozenset(nn.Module().__dict__)
"""What nn.Module itself keeps in an instance: written apart, or not at all."""
RESERVED = frozenset(dir(nn.Module)) | OWN
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
SEQUENCES = {"tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}
DICTS = {"dict": dict, "ordered_dict": OrderedDict}
TORCH_NAMES = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def describe(network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A network as JSON-able data, and its tensors by name; tied tensors and shared modules appear once.

    Raises:
        ValueError: Something that plain data cannot hold; the message names module and attribute.
    """
    writer = _Writer()
    writer.module(network, "")
    return {"modules": writer.modules, "tensors": writer.facts}, writer.tensors


def build(blueprint: Mapping[str, Any], tensors: Mapping[str, Tensor], *, allow: Sequence[str]) -> nn.Module:
    """The network of a blueprint.

    Args:
        blueprint: From `describe`.
        tensors: Its tensors by name.
        allow: Packages whose classes and functions are trusted on top of torch's and ours.

    Raises:
        ValueError: The data is not a blueprint, names something that is not trusted, or lacks a tensor.
    """
    try:
        return _Reader(blueprint, tensors, allow).network()
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not a network's description ({type(error).__name__}: {error})") from None


class _Writer:
    """Collects modules and tensors while it walks the network."""

    def __init__(self) -> None:
        self.modules: list[dict[str, Any]] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        self._index: dict[int, int] = {}
        self._name: dict[int, str] = {}

    def module(self, module: nn.Module, path: str) -> int:
        """Place of a module in the table, written on first sight."""
        if id(module) in self._index:
            return self._index[id(module)]
        where = path or "the network"
        for hooks in HOOKS:
            if module.__dict__.get(hooks):
                raise ValueError(f"{where} has {hooks[1:].replace('_', ' ')}, which cannot be stored; remove them")
        entry: dict[str, Any] = {"class": self._named(type(module), where), "training": module.training}
        self._index[id(module)] = len(self.modules)
        self.modules.append(entry)
        dotted = f"{path}." if path else ""
        for kind in ("parameters", "buffers"):
            table = module.__dict__[f"_{kind}"]
            entry[kind] = {k: None if t is None else self.tensor(t, dotted + k) for k, t in table.items()}
        entry["transient"] = sorted(module._non_persistent_buffers_set)
        children = module._modules.items()
        entry["modules"] = {k: None if child is None else self.module(child, dotted + k) for k, child in children}
        attributes = {key: value for key, value in module.__dict__.items() if key not in OWN}
        entry["attributes"] = {key: self._attribute(key, value, dotted + key) for key, value in attributes.items()}
        return self._index[id(module)]

    def _attribute(self, key: str, value: Any, where: str) -> Any:
        if key in RESERVED:
            raise ValueError(f"{where} replaces a method of torch.nn.Module, which cannot be stored")
        try:
            return self.value(value, where)
        except RecursionError:
            raise ValueError(f"{where} contains itself and cannot be stored") from None

    def tensor(self, tensor: Tensor, name: str) -> str:
        """Name of a tensor in the table, written on first sight."""
        if id(tensor) in self._name:
            return self._name[id(tensor)]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}): not storable")
        while name in self.tensors:
            name += "#"
        self._name[id(tensor)] = name
        layout = LAYOUTS.get(tensor.ndim)
        self.facts[name] = {
            "shape": list(tensor.shape),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad and tensor.is_leaf,
            # Kernels differ by layout in the last bit.
            "channels_last": layout is not None
            and tensor.is_contiguous(memory_format=layout)
            and not tensor.is_contiguous(),
        }
        self.tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return name

    def value(self, value: Any, where: str) -> Any:
        """An attribute's value as JSON-able data: itself, a list, or `{tag: data}`."""
        if type(value) in (NoneType, bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        for kinds, write in _WRITERS:
            if type(value) in kinds:
                return write(self, value, where)
        if isinstance(value, np.generic):
            return self.value(value.item(), where)
        if isinstance(value, nn.Module):
            return {"module": self.module(value, where)}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, where)}
        if isinstance(value, Enum):
            return {"enum": [self._named(type(value), where), value.name]}
        if isinstance(value, type):
            return {"class": self._named(value, where)}
        raise ValueError(f"{where} is a {type(value).__qualname__}, which cannot be stored")

    def _named(self, value: Any, where: str) -> str:
        try:
            return name_of(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _sequence(self, value: Any, where: str) -> Any:
        items = [self.value(item, where) for item in value]
        return items if type(value) is list else {_tag(SEQUENCES, value): items}

    def _mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        pairs = [[self.value(key, where), self.value(item, where)] for key, item in value.items()]
        return {_tag(DICTS, value): pairs}

    def _partial(self, value: partial[Any], where: str) -> Any:
        return {"partial": [self.value(part, where) for part in (value.func, value.args, value.keywords)]}


def _tag(table: Mapping[str, type], value: Any) -> str:
    return next(tag for tag, kind in table.items() if type(value) is kind)


_WRITERS: tuple[tuple[tuple[type, ...], Callable[[_Writer, Any, str], Any]], ...] = (
    ((list, *SEQUENCES.values()), _Writer._sequence),
    (tuple(DICTS.values()), _Writer._mapping),
    ((float,), lambda writer, value, where: {"float": repr(value)}),
    ((slice, range), lambda writer, value, where: {type(value).__name__: [value.start, value.stop, value.step]}),
    ((torch.device,), lambda writer, value, where: {"device": str(value)}),
    (
        tuple(TORCH_NAMES.values()),
        lambda writer, value, where: {_tag(TORCH_NAMES, value): str(value).removeprefix("torch.")},
    ),
    ((partial,), _Writer._partial),
    ((FunctionType, BuiltinFunctionType), lambda writer, value, where: {"function": writer._named(value, where)}),
)


class _Reader:
    """Rebuilds modules in two passes: all empty, then filled, so that any of them can refer to any other."""

    def __init__(self, blueprint: Any, tensors: Mapping[str, Tensor], allow: Sequence[str]) -> None:
        self.entries = blueprint["modules"]
        self.allow = tuple(allow)
        facts = blueprint["tensors"]
        if set(facts) != set(tensors):
            odd = sorted(set(facts) ^ set(tensors))
            raise ValueError(f"tensors and description do not belong together: {', '.join(odd[:3])}")
        self.tensors = {name: _tensor(name, tensors[name], fact) for name, fact in facts.items()}
        self.modules = [self._empty(entry["class"]) for entry in self.entries]

    def network(self) -> nn.Module:
        for module, entry in zip(self.modules, self.entries, strict=True):
            self._fill(module, entry)
        return self.modules[0]

    def _empty(self, name: Any) -> nn.Module:
        # Not cls() and not cls.__new__: no code of the class runs.
        module = object.__new__(resolve_class(name, self.allow))
        module.__dict__.update(nn.Module().__dict__)
        return module

    def _fill(self, module: nn.Module, entry: Any) -> None:
        for key in (*entry["attributes"], *entry["parameters"], *entry["buffers"], *entry["modules"]):
            if key in RESERVED or (key.startswith("__") and key.endswith("__")):
                raise ValueError(f"{entry['class']} may not have an attribute named {key!r}")
        module.training = bool(entry["training"])
        parameters = {key: self._optional(self.tensors, name) for key, name in entry["parameters"].items()}
        if not all(value is None or isinstance(value, nn.Parameter) for value in parameters.values()):
            raise ValueError(f"{entry['class']} lists a plain tensor as a parameter")
        module._parameters.update(parameters)
        module._buffers.update({key: self._optional(self.tensors, name) for key, name in entry["buffers"].items()})
        module._modules.update({key: self._optional(self.modules, at) for key, at in entry["modules"].items()})
        module._non_persistent_buffers_set.update(entry["transient"])
        module.__dict__.update({key: self.value(value) for key, value in entry["attributes"].items()})

    @staticmethod
    def _optional(table: Any, key: Any) -> Any:
        return None if key is None else table[key]

    def value(self, data: Any) -> Any:
        """The value that `_Writer.value` wrote."""
        if isinstance(data, list):
            return [self.value(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((tag, content),) = data.items()
        if tag not in _READERS:
            raise ValueError(f"unknown kind of value {tag!r}")
        return _READERS[tag](self, content)

    def _pairs(self, kind: type, content: Any) -> Any:
        return kind((self.value(key), self.value(item)) for key, item in content)

    def _partial(self, content: Any) -> partial[Any]:
        function, args, keywords = (self.value(part) for part in content)
        return partial(function, *args, **keywords)

    def _enum(self, content: Any) -> Enum:
        kind = resolve_function(content[0], self.allow)
        if not (isinstance(kind, type) and issubclass(kind, Enum)):
            raise ValueError(f"{content[0]!r} is not an enumeration")
        return kind[content[1]]

    def _class(self, name: Any) -> type:
        try:
            return resolve_class(name, self.allow)
        except ValueError:
            return resolve_function(name, self.allow)


def _tensor(name: str, tensor: Tensor, fact: Any) -> Tensor:
    if list(tensor.shape) != fact["shape"]:
        raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, the description says {fact['shape']}")
    if fact["channels_last"]:
        tensor = tensor.contiguous(memory_format=LAYOUTS[tensor.ndim])
    if fact["parameter"]:
        return nn.Parameter(tensor, requires_grad=bool(fact["requires_grad"]))
    return tensor.requires_grad_(bool(fact["requires_grad"]))


def _torch_name(kind: type, name: Any) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, kind):
        raise ValueError(f"torch.{name} is not a {kind.__name__}")
    return value


_READERS: dict[str, Callable[[_Reader, Any], Any]] = {
    **{tag: lambda reader, data, kind=kind: kind(reader.value(data)) for tag, kind in SEQUENCES.items()},
    **{tag: lambda reader, data, kind=kind: reader._pairs(kind, data) for tag, kind in DICTS.items()},
    **{tag: lambda reader, data, kind=kind: _torch_name(kind, data) for tag, kind in TORCH_NAMES.items()},
    "float": lambda reader, data: float(data),
    "slice": lambda reader, data: slice(*data),
    "range": lambda reader, data: range(*data),
    "device": lambda reader, data: torch.device(data),
    "partial": _Reader._partial,
    "function": lambda reader, data: resolve_function(data, reader.allow),
    "class": _Reader._class,
    "enum": _Reader._enum,
    "module": lambda reader, data: reader.modules[data],
    "tensor": lambda reader, data: reader.tensors[data],
}
