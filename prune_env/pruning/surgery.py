"""Surgery: the same plan as zeroed channels in place (`masked`) or as a really smaller network (`cut`).

Both read the graph's slots: which positions of which tensors a group indexes. Cutting is index_select on those
tensors around a shallow copy of the modules: no deep copy of the network and no second tracing. What no plan changes
is looked up once per network, by a `Cutter`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.plan import Plan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

TABLES = frozenset({dict, OrderedDict, set})
"""What a module keeps its parameters, buffers, children and hooks in: each copy needs its own."""

Axes = dict[tuple[str, str], tuple[int, np.ndarray]]
"""(module or parameter name, role) -> (dim of a bare parameter, dropped positions)."""


def tensor_axes(module: nn.Module, role: str) -> tuple[tuple[str, int], ...]:
    """The tensors of a module that one of its axes runs through, each with the dimension."""
    if role == "in":
        return (("weight", 0 if isinstance(module, TRANSPOSED) else 1),)
    if role == "out":
        return (("weight", 1 if isinstance(module, TRANSPOSED) else 0), ("bias", 0))
    return (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))


def dropped_axes(graph: LayerGraph, plan: Plan) -> Axes:
    """For every axis that loses something under the plan: the positions it loses.

    Raises:
        ValueError: The plan does not fit the graph.
    """
    plan.check(graph)
    found: dict[tuple[str, str], tuple[int, list[np.ndarray]]] = {}
    for name, indices in plan.keep.items():
        group = graph.group(name)
        if len(indices) == group.channels:
            continue
        dropped = np.ones(group.channels, dtype=bool)
        dropped[list(indices)] = False
        for slot in group.slots:
            found.setdefault((slot.module, slot.role), (slot.dim, []))[1].append(slot.positions(dropped))
    return {key: (dim, np.concatenate(parts)) for key, (dim, parts) in found.items()}


@contextmanager
def masked(network: nn.Module, graph: LayerGraph, plan: Plan) -> Iterator[nn.Module]:
    """Zero every channel that the plan drops, in place; the exact values return on exit, also after an error.

    A channel is zeroed where it is written, carried and read, so that a layer whose value at zero is not zero
    (a sigmoid, say) cannot leak it.

    Raises:
        ValueError: The plan does not fit the graph.
    """
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for (name, role), (dim, positions) in dropped_axes(graph, plan).items():
                for tensor, axis in _tensors(_named(network, name), role, dim):
                    saved.append((tensor, tensor.detach().clone()))
                    tensor.index_fill_(axis, torch.from_numpy(positions).to(tensor.device), 0)
        yield network
    finally:
        with torch.no_grad():
            # Backwards: a tensor that two axes run through was saved twice, first whole and then half zeroed.
            for tensor, value in reversed(saved):
                tensor.copy_(value)


def _named(network: nn.Module, name: str) -> Any:
    """The module or parameter of a dotted name."""
    for part in name.split(".") if name else ():
        network = getattr(network, part)
    return network


def _tensors(owner: Any, role: str, dim: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The tensors that an axis runs through, each with its dimension."""
    if role == "parameter":
        yield owner, dim
        return
    for attribute, axis in tensor_axes(owner, role):
        tensor = getattr(owner, attribute, None)
        if tensor is not None:
            yield tensor, axis


def cut(network: nn.Module, graph: LayerGraph, plan: Plan) -> nn.Module:
    """A really smaller network that computes what `masked` computes.

    It is an ordinary module of the same classes with new tensors: training it leaves `network` alone. Mode,
    device, dtype and `requires_grad` are kept. Whoever cuts one network many times makes a `Cutter` of it.

    Raises:
        ValueError: The plan does not fit the graph.
    """
    return Cutter(network, graph).cut(plan)


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of some tensors, and the groups that index it.

    Attributes:
        length: Positions of the whole axis.
        device: Where the tensors are.
        slots: The groups, each with its place on the axis.
    """

    length: int
    device: torch.device
    slots: tuple[tuple[Group, Slot], ...]

    @cached_property
    def twin(self) -> str | None:
        """The group whose channels the positions are, one by one; None where it is less simple than that."""
        (group, slot), *others = self.slots
        return group.name if not others and slot.aligned and len(slot.index) == group.channels == self.length else None

    def kept(self, channels: Mapping[str, np.ndarray]) -> torch.Tensor | None:
        """The positions that are kept, int64 in rising order; None where all are.

        Args:
            channels: The kept channels of each group that loses some, int64 in rising order.
        """
        if self.twin is not None:
            kept = channels.get(self.twin)
            return None if kept is None else torch.from_numpy(kept).to(self.device)
        positions = np.ones(self.length, dtype=bool)
        for group, slot in self.slots:
            if group.name in channels:
                dropped = np.ones(group.channels, dtype=bool)
                dropped[channels[group.name]] = False
                positions[slot.positions(dropped)] = False
        return None if positions.all() else torch.from_numpy(positions.nonzero()[0]).to(self.device)


class Part(NamedTuple):
    """One module, and what a plan may change in its copy; an axis is named by its place in the cutter's list.

    Attributes:
        module: The module.
        tables: Attributes that hold tables.
        tensors: (table, key, whether it is a parameter, its axes as (dimension, axis)).
        children: (key, place of the child among the parts).
        sizes: (attribute, n, d, axis): the attribute falls by n for every d positions that the axis loses.
    """

    module: nn.Module
    tables: tuple[str, ...]
    tensors: tuple[tuple[str, str, bool, tuple[tuple[int, int], ...]], ...]
    children: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[str, int, int, int], ...]


class Cutter:
    """Makes the cut networks of many plans from one network; what no plan changes is looked up once.

    Weights, modes and hooks are those of the moment of the cut. Modules and tensors must not come, go or change their
    device or shape in between.

    Args:
        network: The whole network. It is only read.
        graph: Its graph.
    """

    def __init__(self, network: nn.Module, graph: LayerGraph) -> None:
        self._graph = graph
        self._axes: list[Axis] = []
        self._parts: list[Part] = []
        self._tied: list[tuple[tuple[int, str, str], tuple[int, str, str]]] = []
        dims, sizes = self._indexed(network)
        modules = list(network.modules())
        place = {id(module): i for i, module in enumerate(modules)}
        first: dict[int, tuple[int, str, str]] = {}
        for i, module in enumerate(modules):
            tensors = []
            for table in ("_parameters", "_buffers"):
                for key, tensor in module.__dict__[table].items():
                    if id(tensor) in first:
                        self._tied.append(((i, table, key), first[id(tensor)]))
                    elif tensor is not None:
                        first[id(tensor)] = (i, table, key)
                        # Rows first: they are whole blocks of memory, and leave less to pick single columns from.
                        along = tuple(sorted(dims.get(id(tensor), ())))
                        tensors.append((table, key, isinstance(tensor, nn.Parameter), along))
            tables = tuple(name for name, value in module.__dict__.items() if value.__class__ in TABLES)
            children = tuple((key, place[id(child)]) for key, child in module._modules.items() if child is not None)
            self._parts.append(Part(module, tables, tuple(tensors), children, tuple(sizes.get(id(module), ()))))

    def _indexed(
        self, network: nn.Module
    ) -> tuple[dict[int, list[tuple[int, int]]], dict[int, list[tuple[str, int, int, int]]]]:
        """Collects the axes; by identity, the (dimension, axis) of each tensor and the sizes of each module."""
        slots: dict[tuple[str, str], list[tuple[Group, Slot]]] = {}
        for group in self._graph.groups:
            for slot in group.slots:
                slots.setdefault((slot.module, slot.role), []).append((group, slot))
        dims: dict[int, list[tuple[int, int]]] = {}
        sizes: dict[int, list[tuple[str, int, int, int]]] = {}
        known: dict[tuple[object, object], int] = {}
        for (name, role), found in slots.items():
            owner = _named(network, name)
            tensors = list(_tensors(owner, role, found[0][1].dim))
            if not tensors:
                continue
            axis = Axis(tensors[0][0].shape[tensors[0][1]], tensors[0][0].device, tuple(found))
            # Axes that are the channels of one group share their indices.
            key = (name, role) if axis.twin is None else (axis.twin, axis.device)
            number = known.setdefault(key, len(self._axes))
            if number == len(self._axes):
                self._axes.append(axis)
            for tensor, dim in tensors:
                dims.setdefault(id(tensor), []).append((dim, number))
            if role != "parameter":
                sizes.setdefault(id(owner), []).extend((*size, number) for size in _sizes(owner, role))
        return dims, sizes

    def cut(self, plan: Plan) -> nn.Module:
        """The network of a plan, as `cut` makes it.

        Raises:
            ValueError: The plan does not fit the graph.
        """
        plan.check(self._graph)
        channels = {
            name: np.fromiter(kept, np.int64, len(kept))
            for name, kept in plan.keep.items()
            if len(kept) < self._graph.group(name).channels
        }
        kept = [axis.kept(channels) for axis in self._axes]
        lost = [0 if k is None else axis.length - len(k) for axis, k in zip(self._axes, kept, strict=True)]
        copies = [object.__new__(part.module.__class__) for part in self._parts]
        # This runs once per module and episode, hence no call that can be spared.
        with torch.no_grad():
            for copy, (module, tables, tensors, children, sizes) in zip(copies, self._parts, strict=True):
                state = module.__dict__.copy()
                for name in tables:
                    state[name] = state[name].copy()
                for name, key, is_parameter, axes in tensors:
                    table = state[name]
                    whole = value = table[key]
                    for dim, axis in axes:
                        if lost[axis]:
                            value = value.index_select(dim, kept[axis])
                    if value is whole:
                        value = value.clone()
                    table[key] = _parameter(value, whole.requires_grad) if is_parameter else value
                for key, child in children:
                    state["_modules"][key] = copies[child]
                for name, n, d, axis in sizes:
                    state[name] -= lost[axis] * n // d
                object.__setattr__(copy, "__dict__", state)
        for (i, table, key), (j, source, name) in self._tied:
            getattr(copies[i], table)[key] = getattr(copies[j], source)[name]
        return copies[0]


def _parameter(tensor: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """A new tensor as a parameter."""
    if tensor.__class__ is not torch.Tensor:
        return nn.Parameter(tensor, requires_grad)
    # As torch's lazy parameters become plain ones; the constructor would make a second tensor around the first.
    tensor.__class__ = nn.Parameter
    tensor.requires_grad = requires_grad
    return cast(nn.Parameter, tensor)


def _sizes(module: nn.Module, role: str) -> tuple[tuple[str, int, int], ...]:
    """The sizes that a module remembers of an axis: (attribute, n, d), falling by n for every d positions lost."""
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        if role == "both":
            group_out, group_in = module.out_channels // module.groups, module.in_channels // module.groups
            return ("groups", 1, group_out), ("out_channels", 1, 1), ("in_channels", group_in, group_out)
        return ((f"{role}_channels", 1, 1),)
    if isinstance(module, nn.Linear):
        return ((f"{role}_features", 1, 1),)
    if isinstance(module, BATCH_NORMS + INSTANCE_NORMS):
        return (("num_features", 1, 1),)
    if isinstance(module, nn.GroupNorm):
        return ("num_groups", module.num_groups, module.num_channels), ("num_channels", 1, 1)
    if isinstance(module, nn.PReLU):
        return (("num_parameters", 1, 1),)
    return ()
