"""Skipping for one input on a CPU: the network unrolled into steps, its layers run by the compiled kernel.

Between a gated layer and its readers a map holds only the active channels, where everything on the way treats channels
alike; elsewhere it is whole, and readers pick what they need. Norms and rectifiers are folded into the layer in front.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from prune_env.pruning.engine.anatomy import Anatomy
from prune_env.pruning.engine.flow import Flow, Reader
from prune_env.pruning.engine.native import kernel
from prune_env.pruning.engine.steps import GateStep, LayerStep, PoolStep, Runnable, poolable, runnable
from prune_env.pruning.gating.layer import GatedLayer
from prune_env.pruning.gating.walk import unrolled
from prune_env.pruning.surgery import BATCH_NORMS

PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""Modules that do nothing in evaluation mode."""

RECTIFIERS = (nn.ReLU, functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")

ALIKE = (
    *PASSING, *RECTIFIERS, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten,
    functional.relu6, functional.gelu, functional.silu, functional.hardswish, functional.dropout, torch.tanh,
    functional.max_pool2d, torch.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d,
    functional.adaptive_max_pool2d, torch.flatten, "flatten", "tanh", "contiguous",
)  # fmt: skip
"""What treats every channel alike, so that it may run on the active ones alone."""

_programs: WeakKeyDictionary[Anatomy, Program | None] = WeakKeyDictionary()


def program_of(deployed: Anatomy) -> Program | None:
    """The network's program, made once; None where it cannot run here.

    It holds copies of the weights: call `forget` after changing them.
    """
    if deployed not in _programs:
        try:
            _programs[deployed] = None if kernel() is None else Program(deployed)
        except Unfit:
            _programs[deployed] = None
    return _programs[deployed]


def forget(deployed: Anatomy) -> None:
    """Drop the program of a network whose weights have changed."""
    _programs.pop(deployed, None)


class Unfit(ValueError):
    """The network, or a layer of it, cannot run on the kernel."""


class Program:
    """A deployed network as a sequence of steps.

    Args:
        deployed: The network, in float32 on the CPU.

    Raises:
        Unfit: It cannot be unrolled, or a gated layer is of a kind that the kernel does not know.
    """

    def __init__(self, deployed: Anatomy) -> None:
        if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in deployed.parameters()):
            raise Unfit("the kernel runs float32 on the CPU")
        try:
            self.module = unrolled(deployed.network)
        except ValueError as error:
            raise Unfit(str(error)) from None
        self._lock = threading.Lock()
        self.flow, self._gated = Flow(deployed), deployed.names
        self._names = {id(module): name for name, module in deployed.network.named_modules()}
        self._readers: dict[str, Reader] = {}
        for module, layer, index, unit in deployed.reads:
            self._readers.setdefault(module, Reader()).add(layer, index, unit)
        self._slots: dict[fx.Node, int] = {}
        self._done: set[fx.Node] = set()
        self._turns: list[int] = []
        self.steps: list[Callable[[list[Any]], None]] = []
        for node in self.module.graph.nodes:
            if node not in self._done:
                self._add(node)
        if self._turns != list(range(len(self._gated))):
            raise Unfit("a gated layer inside a module of torch's own")
        self._values: list[Any] = [None] * len(self.module.graph.nodes)

    def run(self, x: Float[Tensor, "1 ..."]) -> tuple[Tensor, Int64[Tensor, " layer"]]:
        """Outputs for one input, and the active channels of each gated layer."""
        with self._lock:
            values = self._values.copy()
            values[0] = x.clone() if self._changes else x
            self.flow.begin(torch.get_num_threads())
            for step in self.steps:
                step(values)
            return values[-1], self.flow.counts()

    def _slot(self, node: fx.Node) -> int:
        return self._slots.setdefault(node, len(self._slots))

    def _source(self, node: fx.Node) -> int:
        """The slot of a node's first argument."""
        source = node.args[0]
        if not isinstance(source, fx.Node):
            raise Unfit(f"{node.target}: its input is not another operation's output")
        return self._slot(source)

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self._slot(node) != 0:
                raise Unfit("a network with more than one input")
            # Whatever is no layer may work in place, and the input is the caller's.
            self._changes = not all(self._computes(self._called(user)) for user in node.users)
            return
        if node.op == "output":
            self.steps.append(_answer(self._arguments(node.args[0])))
            return
        if node.op == "get_attr":
            value, at = operator.attrgetter(str(node.target))(self.module), self._slot(node)
            self.steps.append(lambda values: values.__setitem__(at, value))
            return
        called = self._called(node)
        if (isinstance(called, PASSING) or self._computes(called)) and (len(node.args) != 1 or node.kwargs):
            raise Unfit(f"{node.target}: its input is not its one argument")
        if isinstance(called, PASSING):
            self._slots[node] = self._source(node)
        elif isinstance(called, GatedLayer):
            self._gate(node, called)
        elif runnable(called):
            self._layer(node, called)
        elif poolable(called) and len(node.args) == 1 and not node.kwargs:
            self._place(node, node, PoolStep(called, self.flow))
        else:
            self._torch(node)

    def _called(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def _computes(self, called: Any) -> bool:
        return isinstance(called, GatedLayer) or runnable(called)

    def _arguments(self, arguments: Any) -> Callable[[list[Any]], Any]:
        """Arguments of a node, looked up among the values."""
        if isinstance(arguments, fx.Node):
            return operator.itemgetter(self._slot(arguments))
        if isinstance(arguments, tuple | list):
            parts, kind = [self._arguments(part) for part in arguments], type(arguments)
            kind = tuple if kind not in (tuple, list) else kind
            return lambda values: kind(part(values) for part in parts)
        if isinstance(arguments, dict):
            pairs = {key: self._arguments(value) for key, value in arguments.items()}
            return lambda values: {key: part(values) for key, part in pairs.items()}
        if isinstance(arguments, slice):
            ends = [self._arguments(end) for end in (arguments.start, arguments.stop, arguments.step)]
            return lambda values: slice(*(end(values) for end in ends))
        return lambda _: arguments

    def _torch(self, node: fx.Node) -> None:
        """A step of torch's own, or of the network's."""
        called, target = self._called(node), self._slot(node)
        if node.op == "call_method":
            name = str(node.target)

            def called(value: Any, *args: Any, **kwargs: Any) -> Any:
                return getattr(value, name)(*args, **kwargs)

        if len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs:
            source = self._slot(node.args[0])
            self.steps.append(lambda values: values.__setitem__(target, called(values[source])))
            return
        args, kwargs = self._arguments(tuple(node.args)), self._arguments(dict(node.kwargs))
        self.steps.append(lambda values: values.__setitem__(target, called(*args(values), **kwargs(values))))

    def _layer(self, node: fx.Node, module: Runnable) -> None:
        """A layer that is not gated; whatever norm and rectifier stand alone behind it go with it."""
        last, norm = node, None
        behind = self._alone(last)
        if behind is not None and isinstance(self._called(behind), BATCH_NORMS) and _fixed(self._called(behind)):
            last, norm = behind, self._called(behind)
        last, rectify = self._rectified(last)
        reader = self._readers.get(self._names[id(module)])
        step = LayerStep(module, self.flow, norm=norm, rectify=rectify, reader=reader)
        self._place(node, last, step)

    def _gate(self, node: fx.Node, layer: GatedLayer) -> None:
        name = self._names[id(layer)]
        at = self._gated.index(name)
        if not runnable(layer.producer):
            raise Unfit(f"{name}: the kernel does not know its kind")
        last, rectify = self._rectified(node)
        step = GateStep(layer, self.flow, at, rectify=rectify, reader=self._readers.get(name))
        step.whole = not self._compact(last, at)
        self._turns.append(at)
        self._place(node, last, step)

    def _place(self, node: fx.Node, last: fx.Node, step: Callable[[Tensor], Tensor]) -> None:
        source, target = self._source(node), self._slot(last)
        while node is not last:
            self._slots[node] = target
            node = next(iter(node.users))
            self._done.add(node)
        self.steps.append(lambda values: values.__setitem__(target, step(values[source])))

    def _alone(self, node: fx.Node) -> fx.Node | None:
        """The only operation that reads a node; None where there are more, or none."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _rectified(self, node: fx.Node) -> tuple[fx.Node, bool]:
        """The rectifier that alone stands behind a node, past what does nothing; the node itself where none does."""
        behind = self._alone(node)
        while behind is not None and isinstance(self._called(behind), PASSING):
            behind = self._alone(behind)
        if behind is not None and _is(self._called(behind), RECTIFIERS):
            return behind, True
        return node, False

    def _compact(self, node: fx.Node, at: int) -> bool:
        """Whether all that follows a gated layer, up to layers that read it alone, treats channels alike."""
        for user in node.users:
            called = self._called(user) if user.op.startswith("call") else None
            layer = called.producer if isinstance(called, GatedLayer) else called
            if isinstance(layer, nn.Module) and runnable(layer):
                reader = self._readers.get(self._names[id(called)])
                if reader is None or not reader.only(at, layer.weight.shape[1]):
                    return False
            elif not (_is(called, ALIKE) and _first_alone(user) and self._compact(user, at)):
                return False
        return True


def _answer(find: Callable[[list[Any]], Any]) -> Callable[[list[Any]], None]:
    return lambda values: values.__setitem__(-1, find(values))


def _is(called: Any, kinds: Sequence[Any]) -> bool:
    """Whether a module is of one of these classes, or a function or method one of these."""
    if isinstance(called, nn.Module):
        return type(called) in kinds
    return any(called is kind or (isinstance(kind, str) and called == kind) for kind in kinds)


def _first_alone(node: fx.Node) -> bool:
    """Whether a node reads one value and keeps its channels on their axis."""
    if len(node.all_input_nodes) != 1:
        return False
    flattens = node.op != "call_module" and node.target in (torch.flatten, "flatten")
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    return not flattens or bool(start == 1)


def _fixed(norm: _BatchNorm) -> bool:
    return norm.track_running_stats and norm.running_mean is not None
