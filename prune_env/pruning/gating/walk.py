"""Walking: a batch of inputs goes through a gated network layer by layer, and waits at each gate for a decision."""

from __future__ import annotations

from collections.abc import Generator

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from prune_env.pruning.gating.layer import GatedLayer, Question
from prune_env.pruning.gating.network import GatedNetwork

Walk = Generator[Question, Tensor, Tensor]
"""Yields a question per gated layer, is sent the active channels `[sample, channel]`, and returns the outputs."""


class _Tracer(fx.Tracer):
    """Gated layers are steps of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GatedLayer) or super().is_leaf_module(m, module_qualified_name)


class Walker:
    """A gated network as a sequence of operations that can stop at each gate.

    All of a batch is computed once, in one forward pass: nothing in front of a gate runs again.

    Args:
        gated: The network; its modules are shared, so the walker follows a training of it.

    Raises:
        ValueError: The network's control flow depends on its input, so it cannot be unrolled.
    """

    def __init__(self, gated: GatedNetwork) -> None:
        self.gated = gated
        try:
            graph = _Tracer().trace(gated.network)
        except Exception as error:  # the tracer runs the network's own code, which may fail in any way
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the network cannot be walked layer by layer: {line}") from None
        self._module = fx.GraphModule(gated.network, graph)
        at = {id(layer): place for place, layer in enumerate(gated.layers)}
        called = ((node, node.op == "call_module" and gated.network.get_submodule(node.target)) for node in graph.nodes)
        self._gates = {node: at[id(module)] for node, module in called if isinstance(module, GatedLayer)}

    def walk(self, x: Float[Tensor, "sample ..."]) -> Walk:
        """One forward pass that stops at each gate.

        Gradient mode and autocast are those in force at each resumption.
        """
        gated = self.gated
        layers, statics = gated.layers, gated.static.scores()
        run = fx.Interpreter(self._module)
        run.args_iter = iter((x,))
        for node in self._module.graph.nodes:
            at = self._gates.get(node)
            if at is not None:
                layer, static, value = layers[at], statics[at], run.env[node.args[0]]
                pooled, runtime = layer.scores(value)
                active = yield Question(gated.names[at], at, pooled.detach(), runtime.detach(), static.detach())
                run.env[node] = layer.gated(value, runtime, static, active)
            else:
                run.env[node] = run.run_node(node)
                if node.op == "output":
                    return run.env[node]
            for used in run.user_to_last_uses.get(node, ()):
                del run.env[used]
        raise RuntimeError("the network gives no output")


def answer(walk: Walk, decide: object) -> Tensor:
    """Drive a walk to its end with one policy.

    Args:
        walk: A fresh walk.
        decide: Question -> active channels.
    """
    try:
        question = next(walk)
        while True:
            question = walk.send(decide(question))
    except StopIteration as end:
        return end.value


def everything(question: Question) -> Tensor:
    """Every channel is active."""
    return torch.ones_like(question.runtime, dtype=torch.bool)
