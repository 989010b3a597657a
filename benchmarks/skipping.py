"""How much of the macs that it saves a deployed network is really faster: one input at a time, in float32.

Random weights and random agents, whose choices differ between inputs; half of the channels, say, of every gated layer.
How many channels depend on the image is shown ("by image": active for some inputs and not for others) and moved by
`--deviation`: .3 makes nearly all of them, far more than in a trained network.
Beside the dense network in torch (in the layout that is faster) stands the same dense network on the engine: every
channel is active and nothing is decided, so that what the engine gains and what skipping gains can be told apart.
The agent's decisions are part of the deployed network's time and macs.

    python -m benchmarks.skipping --networks m-cifarnet vgg16_bn --threads 1 2 --keep 0.5
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks.subjects import random_gates, random_policy
from benchmarks.timing import take_turns
from prune_env.pruning.calibration import recalibrate
from prune_env.pruning.engine.anatomy import Anatomy
from prune_env.pruning.engine.deployed import DeployedNetwork, deploy
from prune_env.pruning.engine.measurement import measure_deployed
from prune_env.pruning.engine.program import Program, program_of
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.network import attach
from prune_env.pruning.measure import count_macs
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import NETWORKS, make_network

SIDE = 32
"""Height and width of an image."""

COLUMNS = (
    "network", "macs, M", "threads", "trust", "dense, ms", "engine, all active, ms", "engine, ms", "faster",
    "fewer macs", "share", "by image",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Skipping, one input at a time."""

    networks: tuple[str, ...] = ()
    """Networks for images of 32 x 32; by default those of the zoo above `least_macs`."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads."""
    keep: float = 0.5
    """Share of the channels that the agents keep."""
    trusts: tuple[float, ...] = (0.5, 1.0)
    """Trust in the runtime decision: how much of the rest is stored at all."""
    deviation: float = 0.3
    """Standard deviation of a channel's score over images."""
    inputs: int = 8
    """Images, one after the other in each round; times are means over them."""
    rounds: int = 15
    """Timed rounds; the medians are shown."""
    least_macs: float = 10e6
    """Least macs of a network that is measured by default."""


def images_of(count: int) -> Tensor:
    """Random images whose colour and contrast differ, for a gate sees the mean of a map."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    contrast = 0.5 + 1.5 * torch.rand(count, 1, 1, 1, generator=generator)
    return noise * contrast + torch.randn(count, 3, 1, 1, generator=generator)


def names_of(settings: Settings) -> list[str]:
    """The networks to measure."""
    if settings.networks:
        return list(settings.networks)
    example = images_of(1)
    return [name for name in NETWORKS if count_macs(make_network(name, classes=10), example) > settings.least_macs]


def agent_network(
    network: nn.Module, images: Tensor, *, keep: float, trust: float, deviation: float
) -> DeployedNetwork:
    """The network with random gates and a random agent, deployed."""
    gated = attach(network, trace(network, images[:1]), images[:1])
    layers = len(gated.names)
    decide = FixedDecisions((keep,) * layers, (keep,) * layers, trust=trust)
    random_gates(gated, decide, images, deviation=deviation)
    return deploy(gated, decide, random_policy(gated, decide, even=keep))


def open_program(network: nn.Module, deployed: DeployedNetwork) -> Program:
    """The dense network on the engine, without any gate.

    Raises:
        SystemExit: The kernel cannot be compiled here, or cannot run the network.
    """
    program = program_of(Anatomy(network, (), None, deployed.costs, (), ()))
    if program is None or program_of(deployed) is None:
        raise SystemExit("the compiled kernel cannot run the network here: is there a C compiler (cc, gcc or clang)?")
    return program


def each(run: Callable[[Tensor], object], images: Sequence[Tensor]) -> Callable[[int], None]:
    """All images, one by one, as a candidate of `take_turns`."""

    def candidate(_: int) -> None:
        for image in images:
            run(image)

    return candidate


def measure(name: str, settings: Settings) -> list[list[str]]:
    """The rows of one network."""
    network, images = make_network(name, classes=10), images_of(max(settings.inputs, 32))
    recalibrate(network, images)
    laid_out = images[: settings.inputs].contiguous(memory_format=torch.channels_last)
    columnar = copy.deepcopy(network).to(memory_format=torch.channels_last)
    deployed = {
        trust: agent_network(network, images, keep=settings.keep, trust=trust, deviation=settings.deviation)
        for trust in settings.trusts
    }
    program = open_program(network, next(iter(deployed.values())))
    candidates = {
        "default": each(network, images[: settings.inputs].split(1)),
        "channels_last": each(columnar, laid_out.split(1)),
        "open": each(program.run, laid_out.split(1)),
        **{f"trust {trust}": each(engine.run, laid_out.split(1)) for trust, engine in deployed.items()},
    }
    measured = {
        trust: measure_deployed(engine, [(images, torch.zeros(len(images), dtype=torch.long))], dtype=torch.float32)
        for trust, engine in deployed.items()
    }
    macs = {trust: float(engine.macs(engine.run(laid_out)[1]).mean()) for trust, engine in deployed.items()}
    rows = []
    for threads in settings.threads:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            seconds = take_turns(settings.rounds, candidates)
        taken = {key: 1e3 * float(np.median(values)) / settings.inputs for key, values in seconds.items()}
        dense = min(taken["default"], taken["channels_last"])
        for trust, engine in deployed.items():
            whole, mine = float(engine.costs.dense_macs), taken[f"trust {trust}"]
            faster, fewer = dense / mine, whole / macs[trust]
            rows.append([
                name, f"{whole / 1e6:.1f}", str(threads), f"{trust:g}", f"{dense:.3f}", f"{taken['open']:.3f}",
                f"{mine:.3f}", f"{faster:.2f}x", f"{fewer:.2f}x", f"{faster / fewer:.2f}",
                f"{np.mean(measured[trust].varying):.0%}",
            ])  # fmt: skip
    return rows


def main(settings: Settings) -> None:
    """Time all networks and print the table as they come."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in names_of(settings):
        for row in measure(name, settings):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
