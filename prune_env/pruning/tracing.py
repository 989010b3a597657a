"""Tracing: from a network and one example input to its `LayerGraph`, every group verified by running it.

A group is accepted only if masking and cutting it agree on random input, and if the closed form of its cost equals
what torch counts on the cut network. Otherwise its layers stay whole and `fixed` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from prune_env.pruning.coupling import LAYERS, Coupling, Position, couple
from prune_env.pruning.graph import Cost, Group, Layer, LayerGraph, Slot
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.surgery import TRANSPOSED, tensor_axes
from prune_env.pruning.verification import Check


def trace(network: nn.Module, example: torch.Tensor, *, verify: bool = True) -> LayerGraph:
    """Find which channels of a network live or die together, and what they cost.

    Args:
        network: Any module that maps one input tensor to an output. It is not touched: a copy is traced.
        example: One normalised input with its batch axis, on the network's device.
        verify: Accept a group only if its masked and cut networks agree on random input.

    Raises:
        ValueError: The network cannot run on the example, gives values that are not finite, or nothing in it can
            be pruned.
    """
    private = _private_copy(network)
    example = example.float() if example.is_floating_point() else example
    layers, names = _layers(private, example)
    coupling = couple(private, example)
    sketch = _Sketch.of(coupling, private, names)
    graph = _graph(sketch.groups, sketch.fixed, layers, private, example)
    if verify:
        graph = _verified(graph, private, example)
    if not graph.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(graph.fixed.items())[:3])
        raise ValueError(f"the network has no prunable group ({reasons or 'no convolution or linear layer runs'})")
    return graph


def _private_copy(network: nn.Module) -> nn.Module:
    """A copy that may be rearranged, with gradients on, since the tracer follows autograd."""
    private = copy.deepcopy(network).eval().float()
    for parameter in private.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return private


def _layers(network: nn.Module, example: torch.Tensor) -> tuple[tuple[Layer, ...], dict[str, int]]:
    """Convolution and linear layers in forward order, and the place of every module in that order."""
    positions: dict[str, int] = {}
    order: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, output: Any) -> None:
            order.setdefault(name, len(order))
            if isinstance(module, LAYERS):
                tensor = args[0] if isinstance(module, TRANSPOSED) else output
                width = tensor.shape[-1] if isinstance(module, nn.Linear) else tensor.shape[1]
                positions[name] = positions.get(name, 0) + tensor.numel() // width // example.shape[0]

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        with torch.no_grad():
            leaves = [leaf for leaf in tree_leaves(network(example)) if isinstance(leaf, torch.Tensor)]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the network cannot be traced: it fails on an input of shape {tuple(example.shape)}: {message}"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    if not leaves or not all(torch.isfinite(leaf).all() for leaf in leaves if leaf.is_floating_point()):
        raise ValueError("the network cannot be traced: its output on the example input is not finite")
    modules = dict(network.named_modules())
    return tuple(_layer(name, modules[name], count) for name, count in positions.items()), order


def _layer(name: str, module: nn.Module, positions: int) -> Layer:
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", positions, (), (), module.in_features, module.out_features, 1)
    assert isinstance(module, _ConvNd)
    kernel, stride = module.kernel_size, module.stride
    return Layer(name, "conv", positions, kernel, stride, module.in_channels, module.out_channels, module.groups)


@dataclass
class _Sketch:
    """Groups and fixed layers as the coupling says, before any of it is verified."""

    groups: list[Group]
    fixed: dict[str, str]

    @classmethod
    def of(cls, coupling: Coupling, network: nn.Module, order: Mapping[str, int]) -> _Sketch:
        modules = dict(network.named_modules())
        outputs = [name for name in order if isinstance(modules[name], LAYERS)]
        units: dict[tuple, list[list[Position]]] = {}
        fixed: dict[str, str] = {}
        for root, positions in coupling.components().items():
            reason = coupling.blocked.get(root) or _unfit(positions, modules, order)
            if reason:
                for name, role, _ in positions:
                    if role == "out":
                        fixed.setdefault(name, reason)
            else:
                units.setdefault(_signature(positions), []).append(sorted(positions))
        groups = [_group(members, modules, coupling.dims, order) for members in units.values()]
        for group in [g for g in groups if g.channels == 1]:
            fixed |= {slot.module: "its channels form a single unit" for slot in group.producers}
        groups = sorted((g for g in groups if g.channels > 1), key=lambda g: order[g.producers[0].module])
        pruned = {slot.module for group in groups for slot in group.slots if slot.role != "in"}
        fixed = {name: fixed.get(name, "not reached by the tracer") for name in outputs if name not in pruned}
        return cls(_named(groups), fixed)


def _unfit(positions: Sequence[Position], modules: Mapping[str, nn.Module], order: Mapping[str, int]) -> str | None:
    """Why a set of coupled positions cannot be a channel of a group, if it cannot."""
    producers = [p for p in positions if p[1] == "out" and not _grouped(modules[p[0]])]
    if not producers:
        return "its channels are those of an input that stays whole"
    if any(name not in order for name, role, _ in positions if role != "parameter"):
        return "one of its modules does not run in the forward pass"
    for name, role, position in positions:
        if role != "parameter" and position >= _size(modules[name], role):
            return f"the indices that reach {name} do not fit it"
    return None


def _grouped(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear) and getattr(module, "groups", 1) > 1


def _size(module: nn.Module, role: str) -> int:
    if isinstance(module, LAYERS):
        linear = isinstance(module, nn.Linear)
        if role == "in":
            return module.in_features if linear else module.in_channels
        return module.out_features if linear else module.out_channels
    for attribute in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    return 2**62  # a module without parameters: nothing of it is indexed


def _signature(positions: Sequence[Position]) -> tuple:
    """Channels are of one group if they touch the same axes equally often."""
    touched: dict[tuple[str, str], int] = {}
    for name, role, _ in positions:
        touched[name, role] = touched.get((name, role), 0) + 1
    return tuple(sorted(touched.items()))


def _group(
    members: list[list[Position]], modules: Mapping[str, nn.Module], dims: Mapping[str, int], order: Mapping[str, int]
) -> Group:
    axes: dict[tuple[str, str], list[tuple[int, int]]] = {}
    first = min((p for p in members[0] if p[1] == "out" and not _grouped(modules[p[0]])), key=lambda p: order[p[0]])
    # Channels are numbered as the first producer orders them, so that indices mean what a reader expects.
    members = sorted(members, key=lambda unit: min(p[2] for p in unit if p[:2] == first[:2]))
    for unit, positions in enumerate(members):
        for name, role, position in positions:
            axes.setdefault((name, role), []).append((position, unit))
    producers, carriers, consumers = [], [], []
    for (name, role), pairs in sorted(axes.items(), key=lambda item: order.get(item[0][0], 0)):
        index, unit = np.array(sorted(pairs), dtype=np.int64).T
        if role == "parameter":
            carriers.append(Slot(name, role, index, unit, dims[name]))
        elif not isinstance(module := modules[name], LAYERS):
            if next(module.parameters(), None) is not None or getattr(module, "running_mean", None) is not None:
                carriers.append(Slot(name, "both", index, unit))
        elif _grouped(module):
            if role == "out":
                carriers.append(Slot(name, "both", index, unit))
        else:
            (producers if role == "out" else consumers).append(Slot(name, role, index, unit))
    return Group(first[0], len(members), tuple(producers), tuple(carriers), tuple(consumers))


def _named(groups: Sequence[Group]) -> list[Group]:
    """The same groups; those that start at one layer are told apart by `#2`, `#3`."""
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}"
        named.append(Group(name, group.channels, group.producers, group.carriers, group.consumers))
    return named


def _graph(
    groups: Sequence[Group],
    fixed: Mapping[str, str],
    layers: tuple[Layer, ...],
    network: nn.Module,
    example: torch.Tensor,
) -> LayerGraph:
    """The graph with its closed forms; what no layer explains of the counted cost is a constant."""
    full = np.array([group.channels for group in groups], dtype=np.int64)
    costs = {"macs": _macs(groups, layers), "params": _params(groups, network)}
    counted = {"macs": count_macs(network, example), "params": count_params(network)}
    cost = {}
    for name, form in costs.items():
        cost[name] = Cost(counted[name] - float(form(full)), form.weight, form.offset, form.slope)
    return LayerGraph(tuple(groups), dict(fixed), layers, cost)


class _Sizes:
    """Axis sizes as affine functions of the channel counts."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.count = len(groups)
        self.slopes: dict[tuple[str, str], np.ndarray] = {}
        self.dims: dict[str, int] = {}
        for i, group in enumerate(groups):
            for slot in group.slots:
                slope = self.slopes.setdefault((slot.module, slot.role), np.zeros(len(groups)))
                slope[i] = len(slot.index) / group.channels
                self.dims[slot.module] = slot.dim
        self.full = np.array([group.channels for group in groups], dtype=np.float64)

    def of(self, name: str, roles: Sequence[str], size: int) -> tuple[float, np.ndarray]:
        """Constant part and slopes of one axis that has `size` positions in the whole network."""
        slope = sum((self.slopes[name, role] for role in roles if (name, role) in self.slopes), np.zeros(self.count))
        return size - float(slope @ self.full), slope


def _macs(groups: Sequence[Group], layers: Sequence[Layer]) -> Cost:
    sizes = _Sizes(groups)
    terms = []
    for layer in layers:
        outputs = sizes.of(layer.name, ("out", "both"), layer.out_channels)
        inputs = sizes.of(layer.name, ("in",), layer.in_channels // layer.groups)
        terms.append((layer.positions * float(np.prod(layer.kernel)), outputs, inputs))
    return _cost(terms, len(groups))


def _params(groups: Sequence[Group], network: nn.Module) -> Cost:
    sizes = _Sizes(groups)
    terms = []
    for owner, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{owner}.{name}" if owner else name
            axes = _parameter_axes(sizes, owner, path, name, module)
            rest = float(parameter.numel())
            forms = []
            for key, roles, dim in axes:
                forms.append(sizes.of(key, roles, parameter.shape[dim]))
                rest /= parameter.shape[dim]
            forms += [(1.0, np.zeros(len(groups)))] * (2 - len(forms))
            if axes:
                terms.append((rest, forms[0], forms[1]))
    return _cost(terms, len(groups))


def _parameter_axes(
    sizes: _Sizes, owner: str, path: str, name: str, module: nn.Module
) -> list[tuple[str, tuple[str, ...], int]]:
    """The axes of a parameter that some group indexes: (module name, roles, dimension)."""
    if (path, "parameter") in sizes.slopes:
        return [(path, ("parameter",), sizes.dims[path])]
    return [
        (owner, (role,), dim)
        for role in ("out", "both", "in")
        if (owner, role) in sizes.slopes
        for attribute, dim in tensor_axes(module, role)
        if attribute == name
    ]


def _cost(terms: Sequence[tuple], groups: int) -> Cost:
    weight = np.array([term[0] for term in terms])
    offset = np.array([[term[side][0] for term in terms] for side in (1, 2)]).reshape(2, len(terms))
    slope = np.zeros((2, groups, len(terms)))
    for i, term in enumerate(terms):
        slope[0, :, i], slope[1, :, i] = term[1][1], term[2][1]
    return Cost(0.0, weight, offset, slope)


def _verified(graph: LayerGraph, network: nn.Module, example: torch.Tensor) -> LayerGraph:
    """The graph without the groups whose masked and cut networks differ."""
    check = Check(network, graph, example)
    failed = check.failures(graph.groups)
    groups = [group for group in graph.groups if group.name not in failed]
    while groups and (reason := check.disagreement(groups)):
        # Each passes alone and together they do not: the last in forward order gives way.
        failed[groups[-1].name] = reason
        groups.pop()
    pruned = {slot.module for group in groups for slot in group.slots if slot.role != "in"}
    fixed = dict(graph.fixed)
    for group in graph.groups:
        if group.name in failed:
            written = {slot.module for slot in (*group.producers, *group.carriers)} - pruned
            fixed |= dict.fromkeys(written, failed[group.name])
    fixed = {layer.name: fixed[layer.name] for layer in graph.layers if layer.name in fixed}
    return _graph(groups, fixed, graph.layers, network, example)
