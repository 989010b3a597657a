"""Surgery: the same plan as zeroed channels in place (`masked`) or as a really smaller network (`cut`).

Both read the same table of axes: which positions of which tensors a plan keeps. Cutting is index_select on those
tensors around a shallow copy of the module tree: no deep copy of the network and no second tracing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.plan import Plan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

TABLES = frozenset({dict, OrderedDict})
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
    device, dtype and `requires_grad` are kept.

    Raises:
        ValueError: The plan does not fit the graph.
    """
    kept: dict[int, list[tuple[int, torch.Tensor]]] = {}
    resized: dict[int, list[tuple[str, int]]] = {}
    for (name, role), (dim, positions) in dropped_axes(graph, plan).items():
        owner, index = _named(network, name), None
        for tensor, axis in _tensors(owner, role, dim):
            if index is None:
                keep = np.ones(tensor.shape[axis], dtype=bool)
                keep[positions] = False
                index = torch.from_numpy(keep.nonzero()[0]).to(tensor.device)
            kept.setdefault(id(tensor), []).append((axis, index))
        if role != "parameter":
            resized.setdefault(id(owner), []).append((role, len(positions)))
    with torch.no_grad():
        return _copied(network, kept, resized, {})


def _copied(
    module: nn.Module,
    kept: Mapping[int, list[tuple[int, torch.Tensor]]],
    resized: Mapping[int, list[tuple[str, int]]],
    memo: dict[int, Any],
) -> nn.Module:
    """The module tree again around sliced tensors; shared modules and tied tensors stay shared.

    This runs once per module and episode, hence no call that can be spared.
    """
    if id(module) in memo:
        return memo[id(module)]
    copy = object.__new__(type(module))
    memo[id(module)] = copy
    state = module.__dict__.copy()
    for key, value in module.__dict__.items():
        if value.__class__ in TABLES:
            state[key] = value.copy() if value else value.__class__()  # most are empty, and copying one is slow
    for name in ("_parameters", "_buffers"):
        table = state[name]
        for key, tensor in table.items():
            if tensor is not None:
                table[key] = memo[id(tensor)] if id(tensor) in memo else _sliced(tensor, kept, memo)
    modules = state["_modules"]
    for key, child in modules.items():
        if child is not None:
            modules[key] = _copied(child, kept, resized, memo)
    object.__setattr__(copy, "__dict__", state)
    for role, lost in resized.get(id(module), ()):
        _resize(copy, role, lost)
    return copy


def _sliced(
    tensor: torch.Tensor, kept: Mapping[int, list[tuple[int, torch.Tensor]]], memo: dict[int, Any]
) -> torch.Tensor:
    """A new tensor of what is kept; a parameter again where it was one. Runs without gradients."""
    axes, value = kept.get(id(tensor)), tensor
    if axes is None:
        value = tensor.clone()
    else:
        # Rows first: they are whole blocks of memory, and leave less to pick single columns from.
        for axis, index in sorted(axes, key=_axis) if len(axes) > 1 else axes:
            value = value.index_select(axis, index)
    # `isinstance` of Parameter is a method of its own in torch, and slow.
    if tensor.__class__ is nn.Parameter or isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = value
    return value


def _axis(selection: tuple[int, torch.Tensor]) -> int:
    return selection[0]


def _resize(module: nn.Module, role: str, lost: int) -> None:
    """Bring the sizes that a module remembers in line with its tensors."""
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        if role == "both":
            group_out, group_in = module.out_channels // module.groups, module.in_channels // module.groups
            module.groups -= lost // group_out
            module.out_channels -= lost
            module.in_channels = module.groups * group_in
        elif role == "out":
            module.out_channels -= lost
        else:
            module.in_channels -= lost
    elif isinstance(module, nn.Linear):
        if role == "out":
            module.out_features -= lost
        else:
            module.in_features -= lost
    elif isinstance(module, BATCH_NORMS + INSTANCE_NORMS):
        module.num_features -= lost
    elif isinstance(module, nn.GroupNorm):
        module.num_groups -= lost * module.num_groups // module.num_channels
        module.num_channels -= lost
    elif isinstance(module, nn.PReLU):
        module.num_parameters -= lost
