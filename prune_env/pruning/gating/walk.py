"""Walking: a batch of inputs goes through a gated network layer by layer, and waits at each gate for a decision."""

from __future__ import annotations

import copy
from collections.abc import Generator

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from prune_env.pruning.gating.layer import Decide, GatedLayer, Question
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.measure import evaluating
from prune_env.pruning.unrolling import operations

Walk = Generator[Question, Tensor, Tensor]
"""Yields a question per gated layer, is sent the active channels `[sample, channel]`, and returns the outputs."""


def unrolled(network: nn.Module) -> fx.GraphModule:
    """A network's operations in evaluation mode, in order; gated layers are one operation each.

    Raises:
        ValueError: Its control flow depends on its input.
    """
    with evaluating(network):
        return operations(network, whole=(GatedLayer,))


class Walker:
    """A gated network as a sequence of operations that can stop at each gate.

    Modules follow their own mode; what the network's code itself asks of `self.training` is as in evaluation mode.

    All of a batch is computed once, in one forward pass: nothing in front of a gate runs again.

    Args:
        gated: The network; its modules are shared, so the walker follows a training of it.

    Attributes:
        module: Its operations in order.
        gates: The operations that are gated layers, each with its place among them.

    Raises:
        ValueError: The network's control flow depends on its input, so it cannot be unrolled.
    """

    def __init__(self, gated: GatedNetwork) -> None:
        self.gated, self.module = gated, unrolled(gated.network)
        graph = self.module.graph
        self._interpreter = fx.Interpreter(self.module)
        at = {id(layer): place for place, layer in enumerate(gated.layers)}
        called = ((node, node.op == "call_module" and gated.network.get_submodule(node.target)) for node in graph.nodes)
        self.gates = {node: at[id(module)] for node, module in called if isinstance(module, GatedLayer)}

    def walk(self, x: Float[Tensor, "sample ..."]) -> Walk:
        """One forward pass that stops at each gate.

        Gradient mode and autocast are those in force at each resumption.
        """
        layers, statics = self.gated.layers, self.gated.static.scores()
        # Values are the walk's own, so that walks can take turns; when each is used last was found once.
        run = copy.copy(self._interpreter)
        run.env, run.args_iter = {}, iter((x,))
        for node in self.module.graph.nodes:
            at = self.gates.get(node)
            if at is None:
                run.env[node] = run.run_node(node)
            else:
                run.env[node] = yield from self._gate(layers[at], at, run.env[node.args[0]], statics[at])
            for used in run.user_to_last_uses.get(node, ()):
                del run.env[used]
        return run.env[node]

    def _gate(self, layer: GatedLayer, at: int, value: Tensor, static: Tensor) -> Walk:
        """One gated layer; a generator of its own, so that nothing of it stays alive until the next one."""
        value, pooled, runtime = layer.scores(value)
        active = yield Question(self.gated.names[at], at, pooled.detach(), runtime.detach(), static.detach())
        return layer.gated(value, runtime, static, active)


def answer(walk: Walk, decide: Decide) -> Tensor:
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
