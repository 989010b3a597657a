"""The engine: a gated network as it is deployed. What a decision leaves out is not computed.

The active channels' weights are gathered and an ordinary, smaller convolution runs; what lies between gated layers works
on the compact map, and the next layer reads only active inputs. Norms are folded into the layers before them, gates and
the norms that they took the place of into one factor and shift, rectifiers run in place.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from prune_env.pruning.gating.kernel import Kernel
from prune_env.pruning.gating.layer import Decide
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.gating.steps import Alike, Flat, Gate, Joined, Reader, Whole
from prune_env.pruning.gating.walk import Walker
from prune_env.pruning.surgery import BATCH_NORMS, CONVOLUTIONS

NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Modules that do nothing in evaluation."""
RECTIFIERS = (nn.ReLU, functional.relu, torch.relu, torch.relu_, "relu", "relu_")
SUMS = (operator.add, operator.iadd, torch.add)
ALIKE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh,
    functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.silu, functional.gelu,
    functional.hardswish, functional.dropout, torch.relu, torch.tanh, "relu", "relu_", "tanh", "contiguous",
)  # fmt: skip
"""Operations that treat each value for itself (that they leave zero channels zero was checked when gates came)."""
SPATIAL = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
    functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d,
)  # fmt: skip
"""Operations that treat each channel for itself."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one run gave.

    Attributes:
        outputs: What the network returns.
        masks: `[sample, channel]` active channels of each gated layer.
    """

    outputs: Any
    masks: tuple[Bool[Tensor, "sample channel"], ...]

    @cached_property
    def counts(self) -> Int64[np.ndarray, "sample layer"]:
        """Active channels: what `Accounting.macs` counts with."""
        return np.stack([mask.sum(1).numpy() for mask in self.masks], axis=1)


class Engine:
    """Runs a gated network on the CPU in float32, in evaluation mode, with its weights of this moment.

    Args:
        gated: The network; it is left as it is.
        crossover: Group -> share of active channels up to which gathering is faster than the whole layer; groups not
            named go by their size.

    Raises:
        ValueError: The network cannot be unrolled, or an unknown group or share.
    """

    def __init__(self, gated: GatedNetwork, crossover: Mapping[str, float] | None = None) -> None:
        private = GatedNetwork(
            copy.deepcopy(gated.network), copy.deepcopy(gated.static), gated.graph, gated.names, gated.skipped
        )
        with torch.no_grad():
            self._program, self._slots, self.gates = _Compiler(private.cpu().float().eval()).compiled()
        for gate in self.gates:
            gate.most = int((crossover or {}).get(gate.name, 1.0) * gate.kernel.channels)

    def run(self, x: Float[Tensor, "sample ..."], decide: Decide) -> Outcome:
        """Inputs to outputs under some decisions.

        Args:
            x: Normalised inputs on the CPU, float32.
            decide: Question -> active channels.
        """
        masks: list[Tensor] = []

        def ask(question: Any) -> Tensor:
            mask = decide(question)
            masks.append(mask)
            return mask

        values: list[Any] = [None] * self._slots
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        values[0], values[1] = ask, x
        with torch.inference_mode():
            for function, sources, target in self._program:
                values[target] = function(*[values[source] for source in sources])
        return Outcome(values[target], tuple(masks))


class _Compiler:
    """Turns the operations of a gated network into steps."""

    def __init__(self, gated: GatedNetwork) -> None:
        self.gated = gated
        walker = Walker(gated)
        self.graph, self.gates = walker.module.graph, dict(walker.gates)
        self.statics = [score.detach() for score in gated.static.scores()]
        self.fused: dict[fx.Node, nn.Module] = {}
        self.rectified: set[fx.Node] = set()

    def compiled(self) -> tuple[list[tuple[Callable[..., Any], tuple[int, ...], int]], int, list[Gate]]:
        """Steps as (function, places of its arguments, place of its value), the number of places, and the gates."""
        for simplify in (self._without_nothing, self._fuse_norm, self._fuse_rectifier):
            for node in list(self.graph.nodes):
                simplify(node)
        slots: dict[fx.Node, int] = {}
        last = {used: node for node in self.graph.nodes for used in node.all_input_nodes}
        free, count, program, gates = [], 2, [], []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                slots[node] = 1
                continue
            step = self._step(node)
            sources = tuple(slots[used] for used in node.all_input_nodes)
            if isinstance(step, Gate):
                sources = (0, *sources)
                gates.append(step)
            if not free:
                free.append(count)
                count += 1
            slots[node] = free.pop()
            program.append((step, sources, slots[node]))
            free += [slots[used] for used in node.all_input_nodes if last[used] is node and slots[used] > 1]
        return program, count, gates

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.gated.network.get_submodule(node.target) if node.op == "call_module" else None

    def _is(self, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
        """Whether a node calls one of some module classes, functions or methods."""
        module = self._module(node)
        return type(module) in kinds if module is not None else node.target in kinds

    def _replace(self, node: fx.Node) -> None:
        node.replace_all_uses_with(node.args[0])
        self.graph.erase_node(node)

    def _without_nothing(self, node: fx.Node) -> None:
        if self._is(node, NOTHING):
            self._replace(node)

    def _fuse_norm(self, node: fx.Node) -> None:
        """A norm right behind a layer without a gate goes into the layer's weights."""
        norm, before = self._module(node), node.args[0] if node.args else None
        if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or len(before.users) > 1:
            return
        layer = self.fused.get(before, self._module(before))
        if isinstance(layer, CONVOLUTIONS):
            self.fused[before] = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            self.fused[before] = fuse_linear_bn_eval(layer, norm)
        else:
            return
        self._replace(node)

    def _fuse_rectifier(self, node: fx.Node) -> None:
        """A rectifier that alone reads what it is given works in place."""
        if not self._is(node, RECTIFIERS):
            return
        before = node.args[0]
        fresh = before in self.gates or isinstance(self._module(before), (*CONVOLUTIONS, nn.Linear, *BATCH_NORMS))
        if len(before.users) == 1 and (fresh or self._is(before, SUMS)):
            self.rectified.add(before)
            self._replace(node)

    def _step(self, node: fx.Node) -> Callable[..., Any]:
        """What the node does."""
        rectify, module = node in self.rectified, self.fused.get(node, self._module(node))
        if node in self.gates:
            at = self.gates[node]
            return Gate(module, self.gated.names[at], at, self.statics[at], rectify=rectify)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return Reader(Kernel(module, module.weight, module.bias, rectify=rectify))
        if node.op == "get_attr":
            return lambda value=operator.attrgetter(node.target)(self.gated.network): value
        if self._joins(node):
            return Joined()
        if self._flattens(node):
            return Flat()
        function = _bound(node, self._function(node, module))
        if rectify:
            function = _rectified(function)
        if len(node.all_input_nodes) == 1:
            if self._is(node, ALIKE):
                return Alike(function, spatial=False)
            if self._is(node, SPATIAL) or self._averages(node):
                return Alike(function, spatial=True)
        return Whole(function)

    @staticmethod
    def _function(node: fx.Node, module: nn.Module | None) -> Callable[..., Any]:
        if node.op == "call_method":
            return lambda value, *rest, **options: getattr(value, node.target)(*rest, **options)
        if node.op == "output":
            return lambda value: value
        return node.target if module is None else module

    def _joins(self, node: fx.Node) -> bool:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        maps = node.args[0] if node.args else ()
        return (
            self._is(node, (torch.cat,))
            and dim == 1
            and all(isinstance(map, fx.Node) for map in maps)
            and len(node.all_input_nodes) == len(maps)
        )

    def _flattens(self, node: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        return self._is(node, (torch.flatten, "flatten")) and node.args[1:] == (1,) and not node.kwargs

    def _averages(self, node: fx.Node) -> bool:
        """Whether it is the mean over some axes behind the channels'."""
        axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = (axes,) if isinstance(axes, int) else axes
        return self._is(node, (torch.mean, "mean")) and axes is not None and all(axis >= 2 for axis in axes)


def _bound(node: fx.Node, function: Callable[..., Any]) -> Callable[..., Any]:
    """The node's function of the values that it reads, with its constants filled in."""
    inputs, args, options = node.all_input_nodes, node.args, dict(node.kwargs)
    if not options and list(args) == inputs:
        return function
    if len(inputs) == 1 and args[0] is inputs[0] and not _nested((args[1:], options)):
        rest = args[1:]
        return lambda value: function(value, *rest, **options)

    def call(*values: Any) -> Any:
        table = dict(zip(inputs, values, strict=True))
        filled = fx.node.map_arg((args, options), table.__getitem__)
        return function(*filled[0], **filled[1])

    return call


def _nested(arguments: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return bool(found)


def _rectified(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *values: function(*values).relu_()
