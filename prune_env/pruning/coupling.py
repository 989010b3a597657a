"""Coupling: which channel positions of which layers live or die together, by Torch-Pruning's dependency graph.

Torch-Pruning records how layers depend on each other and how indices move through concatenation, split and flatten.
Here every edge of that graph joins positions one by one (union-find), so what comes out is exact per position: the
two halves of a split, or the sides of a concatenation, may belong to different groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch_pruning
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning import _helpers
from torch_pruning.pruner.function import BasePruningFunc

Position = tuple[str, str, int]
"""(module or parameter name, role, position along the axis); a name with `#` is an operation without a module."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
PER_CHANNEL = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.PReLU,
)
OUTPUT = "the network's output"


@dataclass
class Coupling:
    """A union-find over channel positions.

    Attributes:
        label: Position -> a node of the forest.
        parent: The forest.
        blocked: Root of a tree -> why nothing in it can be pruned.
        dims: Bare parameter name -> the axis that is indexed.
    """

    label: dict[Position, int] = field(default_factory=dict)
    parent: list[int] = field(default_factory=list)
    blocked: dict[int, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)

    def node(self, position: Position) -> int:
        """The forest's node of a position, new if it was never seen."""
        if position not in self.label:
            self.parent.append(len(self.parent))
            self.label[position] = len(self.parent) - 1
        return self.label[position]

    def find(self, node: int) -> int:
        """The root of a node's tree."""
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, one: int, other: int) -> None:
        """Make two trees one; a reason against either is a reason against both."""
        one, other = self.find(one), self.find(other)
        if one != other:
            self.parent[other] = one
            if other in self.blocked:
                self.blocked.setdefault(one, self.blocked.pop(other))

    def block(self, node: int, reason: str) -> None:
        """Say why a tree must stay whole; the first reason stands."""
        self.blocked.setdefault(self.find(node), reason)

    def components(self) -> dict[int, list[Position]]:
        """Root -> the positions of real modules and parameters in its tree."""
        found: dict[int, list[Position]] = {}
        for position, node in self.label.items():
            if "#" not in position[0]:
                found.setdefault(self.find(node), []).append(position)
        return found


def couple(network: nn.Module, example: torch.Tensor) -> Coupling:
    """Join the channel positions of a network that live or die together.

    A part that the tracer cannot follow (a channel shuffle, say) is closed: what it reads and writes is blocked, and
    the parts inside it are traced on their own, so that the rest of the network still prunes.

    Args:
        network: A private copy of the network, in eval mode and with `requires_grad` on.
        example: One input batch.
    """
    coupling = Coupling()
    inputs = _module_inputs(network, example)
    closed = _untraceable(network, "", inputs)
    for name in closed:
        prefix = f"{name}." if name else ""
        for child, module in network.get_submodule(name).named_children():
            if prefix + child in inputs and prefix + child not in closed and _has_layers(module):
                _couple_part(coupling, network, prefix + child, inputs, closed)
    if "" not in closed:
        _couple_part(coupling, network, "", inputs, closed)
    _join_grouped(coupling, network)
    _block_tied(coupling, network)
    return coupling


class _Barrier(torch.autograd.Function):
    """One node in the recorded graph for a module whose inside cannot be followed."""

    @staticmethod
    def forward(ctx: object, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.clone()


class _Closed(nn.Module):
    """Stands for a module that cannot be traced: same output, no inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        # Not a parameter: it only keeps the barrier in the recorded graph when nothing before it needs gradients.
        self.anchor = torch.zeros((), requires_grad=True)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = self.inner(*args)
        return _Barrier.apply(output, self.anchor, *args)


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(m, LAYERS) for m in module.modules())


def _module_inputs(network: nn.Module, example: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """The tensors that each module reads in one forward pass; modules called with anything else are left out."""
    inputs: dict[str, tuple[torch.Tensor, ...]] = {}

    def hook(name: str):
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not kwargs and args and all(isinstance(a, torch.Tensor) for a in args):
                inputs.setdefault(name, tuple(a.detach() for a in args))

        return record

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in network.named_modules() if name]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    inputs[""] = (example,)
    return inputs


@contextmanager
def _replaced(network: nn.Module, part: str, closed: Mapping[str, str]) -> Iterator[nn.Module]:
    """The part of the network with every closed module inside it behind a barrier."""
    inside = [n for n in closed if n != part and n.startswith(f"{part}." if part else "")]
    outermost = [n for n in inside if not any(n != o and n.startswith(f"{o}.") for o in inside)]
    swapped = []
    try:
        for name in outermost:
            parent, _, child = name.rpartition(".")
            owner = network.get_submodule(parent)
            swapped.append((owner, child, owner._modules[child]))
            owner._modules[child] = _Closed(owner._modules[child])  # type: ignore[arg-type]
        yield network.get_submodule(part)
    finally:
        for owner, child, module in swapped:
            owner._modules[child] = module


def dependencies(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch_pruning.DependencyGraph:
    """Torch-Pruning's graph of a module, whose parameters want gradients; whatever it cannot follow may be raised."""
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        # As a tuple: a bare tensor would be unpacked along its batch axis.
        graph.build_dependency(module, inputs, verbose=False)
    return graph


def _untraceable(network: nn.Module, name: str, inputs: Mapping[str, tuple[torch.Tensor, ...]]) -> dict[str, str]:
    """The smallest modules that Torch-Pruning cannot follow, with its error."""
    module = network.get_submodule(name)
    try:
        dependencies(module, inputs[name])
        return {}
    except Exception as error:  # Torch-Pruning has no error class of its own: anything may come out of a trace
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    closed: dict[str, str] = {}
    for child, sub in module.named_children():
        path = f"{name}.{child}" if name else child
        if path in inputs and _has_layers(sub):
            closed |= _untraceable(network, path, inputs)
    if closed:
        try:
            with _replaced(network, name, closed) as rest:
                dependencies(rest, inputs[name])
            return closed
        except Exception as error:  # the part around the closed ones cannot be followed either
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return closed | {name: reason}


def _couple_part(
    coupling: Coupling,
    network: nn.Module,
    part: str,
    inputs: Mapping[str, tuple[torch.Tensor, ...]],
    closed: Mapping[str, str],
) -> None:
    """Add the edges of one part of the network that can be traced on its own."""
    parent = part.rpartition(".")[0]
    boundary = OUTPUT
    if part:
        kind = type(network.get_submodule(parent)).__name__
        boundary = f"read by {parent or 'the network'} ({kind}), which rearranges channels (a shuffle, say) untraceably"
    names = {module: name for name, module in network.named_modules()}
    with _replaced(network, part, closed) as module:
        graph = dependencies(module, inputs[part])
        walk = _Walk(coupling, graph, names, f"{part}." if part else "", boundary)
        for layer in list(graph.module2node):
            if isinstance(layer, LAYERS):
                walk.from_layer(layer)


@dataclass
class _Walk:
    """A walk over one dependency graph that joins what each edge couples."""

    coupling: Coupling
    graph: torch_pruning.DependencyGraph
    names: Mapping[nn.Module, str]
    prefix: str
    boundary: str
    seen: set[Position] = field(default_factory=set)

    @cached_property
    def widest(self) -> int:
        """The widest axis of any layer: what a chain of reshapes leads beyond it, nothing reads."""
        layers = [module for module in self.graph.module2node if isinstance(module, LAYERS)]
        return max((max(module.weight.shape[:2]) * getattr(module, "groups", 1) for module in layers), default=0)

    def from_layer(self, layer: nn.Module) -> None:
        """Follow all outputs of a convolution or linear layer."""
        pruner = self._pruner(layer)
        fn = pruner.prune_out_channels
        node = self.graph.module2node[layer]
        name = self._name(node)
        start = []
        if pruner.get_out_channels(layer) == 1:
            # Never followed: where its one channel is broadcast over many, it is coupled to none of them.
            self.coupling.block(self.coupling.node((name, self._role(node, fn), 0)), "it has a single channel")
            return
        for i in range(pruner.get_out_channels(layer)):
            position = (name, self._role(node, fn), i)
            root = self.coupling.node(position)
            if not node.outputs:
                self.coupling.block(root, self.boundary)
            if position not in self.seen:
                self.seen.add(position)
                start.append(_helpers._HybridIndex(idx=i, root_idx=root))
        stack = [(node, fn, start)]
        while stack:
            node, fn, indices = stack.pop()
            stack.extend(self._edges(node, fn, indices))

    def _pruner(self, layer: nn.Module) -> BasePruningFunc:
        pruner = self.graph.get_pruner_of_module(layer)
        assert pruner is not None, "Torch-Pruning has one for every convolution and linear layer"
        return pruner

    def _edges(self, node, fn, indices):
        for edge in node.dependencies:
            if not indices or not edge.is_triggered_by(fn):
                continue
            moved = indices
            for mapping in edge.index_mapping:
                moved = moved if mapping is None else mapping(moved)
            fresh = self._reach(edge.target, edge.handler, moved)
            if fresh:
                yield edge.target, edge.handler, fresh

    def _reach(self, node, fn, indices) -> list:
        """Join the positions that an edge leads to; those never seen before are to be followed."""
        name, role, reason, size = self._name(node), self._role(node, fn), self._reason(node, fn), self._size(node, fn)
        if size == 1 and len(indices) > 1:
            return []
        fresh = []
        for index in indices:
            if index.idx >= size:
                where = name.split("#")[0] or "a reshape"
                self.coupling.block(index.root_idx, f"the indices that reach {where} do not fit it")
                continue
            position = (name, role, index.idx)
            reached = self.coupling.node(position)
            self.coupling.join(index.root_idx, reached)
            if reason:
                self.coupling.block(reached, reason)
            elif position not in self.seen:
                fresh.append(index)
            self.seen.add(position)
        return fresh

    def _size(self, node, fn) -> int:
        """Positions that an axis has; of an operation without a module, what the widest layer reads or writes."""
        if isinstance(node.module, LAYERS):
            pruner = self._pruner(node.module)
            outputs = self._role(node, fn) == "out"
            return pruner.get_out_channels(node.module) if outputs else pruner.get_in_channels(node.module)
        return self.widest

    def _name(self, node) -> str:
        module = node.module
        if isinstance(module, nn.Parameter):
            name = self.prefix + self.graph._param_to_name[module]
            self.coupling.dims[name] = node.pruning_dim
            return name
        return self.names.get(module, f"{self.prefix}#{id(module)}")

    def _role(self, node, fn) -> str:
        if isinstance(node.module, nn.Parameter):
            return "parameter"
        if not isinstance(node.module, LAYERS):
            return "both"
        # Torch-Pruning gives a depthwise convolution one function for both sides.
        return "out" if self.graph.is_out_channel_pruning_fn(fn) else "in"

    def _reason(self, node, fn) -> str | None:
        """Why a node forbids pruning what reaches it, if it does."""
        module, kind = node.module, type(node.module).__name__
        if kind == "_OutputOp" or (not node.outputs and self._role(node, fn) != "in"):
            return self.boundary
        if module in self.names or isinstance(module, nn.Parameter):
            known = isinstance(module, (*LAYERS, *PER_CHANNEL, nn.Parameter)) or next(module.parameters(), None) is None
            return None if known else f"passes through {kind} ({self._name(node)}), which mixes all channels"
        operation = node.grad_fn.name() if hasattr(node.grad_fn, "name") else kind
        if "_Barrier" in operation:
            return "read or written by a part that rearranges channels (a shuffle, say) untraceably"
        if "ConstantPadNd" in operation and any(node.grad_fn._saved_pad[4:]):
            return "a shortcut pads the channels with a fixed number of zeros"
        return None


def _join_grouped(coupling: Coupling, network: nn.Module) -> None:
    """Positions inside one group of a grouped convolution or GroupNorm are one unit: it stays or goes as a whole."""
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm):
            _join_blocks(coupling, name, "both", module.num_channels // module.num_groups)
        elif isinstance(module, LAYERS) and not isinstance(module, nn.Linear) and module.groups > 1:
            _join_convolution(coupling, name, module)


def _join_convolution(coupling: Coupling, name: str, module: _ConvNd) -> None:
    reads, writes = module.in_channels // module.groups, module.out_channels // module.groups
    # Torch-Pruning writes a depthwise convolution's input as its output: one function prunes both.
    depthwise = module.groups == module.out_channels
    traced = (depthwise and reads == 1) or (name, "in", 0) in coupling.label
    _join_blocks(coupling, name, "out", writes)
    _join_blocks(coupling, name, "in", reads)
    for block in range(module.groups):
        output = coupling.node((name, "out", block * writes))
        coupling.join(output, coupling.node((name, "in", block * reads)))
        if not traced:
            coupling.block(output, f"the inputs of the grouped convolution {name} cannot be traced")


def _join_blocks(coupling: Coupling, name: str, role: str, size: int) -> None:
    for position, node in [(p, n) for p, n in coupling.label.items() if p[0] == name and p[1] == role]:
        first = (name, role, position[2] // size * size)
        coupling.join(coupling.node(first), node)


def _block_tied(coupling: Coupling, network: nn.Module) -> None:
    """A tensor that two modules share stays whole: each would cut it for itself."""
    owners: dict[int, set[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    tied = {owner: sorted(names) for names in owners.values() if len(names) > 1 for owner in names}
    for position, node in coupling.label.items():
        if position[0] in tied:
            coupling.block(node, f"shares a tensor with {', '.join(n for n in tied[position[0]] if n != position[0])}")
