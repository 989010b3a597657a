"""The deployed network: a gated network with its static part cut away and its decisions built in.

Called, it *skips*: an inactive channel is neither computed nor read (`program.py` for one input at a time, `grouped.py`
for inputs that share a choice). `masked` computes everything and closes gates; both give the same outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from prune_env.pruning.engine.anatomy import HOOKED, Anatomy, Choice, Read, Session
from prune_env.pruning.engine.costs import Costs
from prune_env.pruning.engine.grouped import run_grouped
from prune_env.pruning.engine.policy import RuntimePolicy
from prune_env.pruning.engine.program import forget, program_of
from prune_env.pruning.gating.accounting import Accounting
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.network import GatedNetwork, producer_of
from prune_env.pruning.gating.stored import plan_of, static_decisions


class DeployedNetwork(Anatomy):
    """A network for inference whose inactive channels cost nothing; made by `deploy`, stored by `prune_env.save`.

    Of its weights a program keeps copies that it runs: whoever changes them in place calls `program.forget`.
    """

    def train(self, mode: bool = True) -> DeployedNetwork:
        """Evaluation mode only.

        Raises:
            ValueError: Training mode is asked for.
        """
        if mode:
            raise ValueError("a deployed network is for inference; train the gated network it was made from")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedNetwork:
        """Moved or converted weights make another program."""
        forget(self)
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Other weights make another program."""
        forget(self)
        return super().load_state_dict(*args, **kwargs)

    def forward(self, x: Float[Tensor, "sample ..."]) -> Tensor:
        """Outputs, computed from active channels only."""
        return self.run(x)[0]

    def run(self, x: Float[Tensor, "sample ..."]) -> tuple[Tensor, Int64[Tensor, "sample layer"]]:
        """Outputs, and the active channels of each gated layer."""
        if len(x) == 0:
            return self.masked(x)
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        program = program_of(self) if plain else None
        if program is None or (len(x) > 1 and self.constant):
            return run_grouped(self, x)
        with torch.inference_mode():
            if len(x) == 1:
                outputs, counts = program.run(x)
                return outputs, counts[None]
            outputs, counts = zip(*(program.run(one) for one in x.split(1)), strict=True)
            return torch.cat(outputs), torch.stack(counts)

    def masked(self, x: Float[Tensor, "sample ..."]) -> tuple[Tensor, Int64[Tensor, "sample layer"]]:
        """The same by computing every stored channel and closing the gates of inactive ones."""
        logits, active = self.chosen(x)
        return logits, torch.stack([layer.sum(1) for layer in active], dim=1)

    def chosen(self, x: Float[Tensor, "sample ..."]) -> tuple[Tensor, list[Bool[Tensor, "sample channel"]]]:
        """The same, with the active channels of each layer in the place of their number."""
        session = Session(self, len(x))
        with torch.inference_mode(), HOOKED:
            for at, layer in enumerate(self.layers):
                layer._turn = lambda pooled, runtime, at=at: session.turn(at, pooled, runtime)
            try:
                return self.network(x.clone()), session.active
            finally:
                for layer in self.layers:
                    layer._turn = None

    def macs(self, counts: Int64[Tensor, "sample layer"]) -> Float64[Tensor, " sample"]:
        """Macs of inputs with these active channels, predictors counted."""
        return self.costs.macs(list(counts.unbind(1)))


def deploy(gated: GatedNetwork, decide: FixedDecisions, policy: RuntimePolicy | None = None) -> DeployedNetwork:
    """Cut away what is never active, and build the decisions in.

    Args:
        gated: The trained network; it is left as it is.
        decide: Static shares and trust, and the runtime shares where there is no policy.
        policy: Decides the runtime shares; made for the layers as the static shares leave them.
    """
    scores = [score.detach() for score in gated.static.scores()]
    decisions = static_decisions(gated, decide.static_keeps, decide.trust)
    plan = plan_of(gated, decisions)
    small = gated.cut(plan)
    choices = [
        Choice(
            full=len(score), keep=keep, score=score[decision.kept], doubted=decision.doubted[decision.kept],
            trust=decide.trust,
        )
        for score, decision, keep in zip(scores, decisions, decide.runtime_keeps, strict=True)
    ]  # fmt: skip
    kept = np.array([len(decision.kept) for decision in decisions], dtype=np.int64)
    names = [producer_of(gated.graph, name).module for name in gated.names]
    costs, policy = Costs(Accounting.of(gated), kept), copy.deepcopy(policy)
    deployed = DeployedNetwork(small.network, choices, policy, costs, names, _reads(small))
    return deployed.eval().requires_grad_(False)


def _reads(gated: GatedNetwork) -> list[Read]:
    """Who reads the channels of the gated layers of a cut network."""
    reads = []
    for at, name in enumerate(gated.names):
        group = gated.graph.group(name)
        for slot in group.consumers:
            width = gated.graph.layer(slot.module).in_channels
            alike = slot.aligned and len(slot.index) == group.channels == width
            pairs = (None, None) if alike else (tuple(slot.index.tolist()), tuple(slot.unit.tolist()))
            reads.append(Read(slot.module, at, *pairs))
    return reads
