"""What the benchmarks run on: a task by name, or a network of the zoo on random images and with random agents."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_env.config import problem_from
from prune_env.envs.dynamics import Problem
from prune_env.gates import deciding
from prune_env.pruning.calibration import recalibrate
from prune_env.pruning.engine.policy import PolicySeat, RuntimePolicy, Sight
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.gating.stored import static_decisions, stored_inputs
from prune_env.tasks.networks import make_network


def random_images(count: int, *, seed: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Images `[count, 3, side, side]` from N(0, 1), and labels of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def random_problem(network: str, *, calibration: int, search: int, budget: float) -> Problem:
    """The decision problem of a network of the zoo, with random weights, on random images of 32 x 32."""
    return problem_from(
        make_network(network, classes=10),
        calibration=random_images(calibration, seed=0),
        search=random_images(search, seed=1),
        name=network,
        budget=budget,
    )


def random_gates(
    gated: GatedNetwork, decide: FixedDecisions, images: Tensor, *, deviation: float = 0.3, seed: int = 0
) -> None:
    """Move gates and static scores as a training would: what is active differs between images and between channels.

    Args:
        gated: The network; its statistics become those of the images under the decisions.
        decide: The decisions.
        images: What it will see.
        deviation: Standard deviation of a channel's score over images; over channels it is .1 more than before.
        seed: Seed of the gates.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated.layers:
            layer.gate.weight.normal_(generator=generator)
            seen = layer.predictor()[0] * layer.sight.running_var.sqrt()
            layer.gate.weight *= deviation / seen.norm(dim=1, keepdim=True)
            layer.gate.bias += 0.1 * torch.randn(layer.gate.bias.shape, generator=generator)
        for scores in gated.static.parameters():
            scores += 0.2 * torch.randn(scores.shape, generator=generator)
    with deciding(gated, decide):
        recalibrate(gated, images)


def random_policy(
    gated: GatedNetwork, decide: FixedDecisions, *, even: float, hidden: int = 128, gain: float = 8.0, seed: int = 0
) -> RuntimePolicy:
    """A runtime policy with random weights: its shares are about `even` and differ between images.

    Args:
        gated: The network that it decides for.
        decide: The static decisions, which leave the channels that it sees.
        even: The share that it moves away from.
        hidden: Width of its encoders and of its recurrent layer; that of the learned agent.
        gain: Deviation of a weighted sum of its inputs: the larger, the more its shares differ.
        seed: Seed of its weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return gain * torch.randn(shape, generator=generator) / shape[0] ** 0.5

    decisions = static_decisions(gated, decide.static_keeps, decide.trust)
    sees = (Sight(0.0, 1.0), Sight(1.0, 1.0))
    seats = [
        PolicySeat(
            weights(len(inputs), hidden), weights(len(decision.kept), hidden), torch.zeros(hidden),
            torch.zeros(4 * hidden), sees, even,
        )
        for inputs, decision in zip(stored_inputs(gated, decisions), decisions, strict=True)
    ]  # fmt: skip
    recurrent = {name: weights(hidden, 4 * hidden) / hidden**0.5 for name in ("encoded", "recurrent")}
    alone = {name: weights(1, 4 * hidden)[0] / gain for name in ("spent", "previous")}
    head = 0.2 * weights(hidden) / gain
    return RuntimePolicy(seats, **recurrent, **alone, head=head, head_bias=0.0, least=0.1)
