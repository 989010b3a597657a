"""Evaluating a pruned network: really smaller, against whole with zeroed channels.

Both sides are the same plan (the same share in every group, as much as half the macs allow), evaluated as everything
in the project is: in batches, channels_last, in the number format that is fast here; with convolution, norm, addition
and rectifier as one operation, as a meter runs them, and one by one, as the network's own code does.

    python -m benchmarks.masked_vs_cut
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import tyro

from benchmarks.fusing import outputs, plain
from benchmarks.timing import show, take_turns, uniform_plan
from prune_env.number_format import fast_format, number_format
from prune_env.pruning.fusion import fused
from prune_env.pruning.measure import BATCH_SIZE, prepare_images
from prune_env.pruning.surgery import cut, masked
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network


@dataclass(frozen=True)
class Settings:
    """Cut against masked."""

    networks: tuple[str, ...] = ("resnet20", "resnet56", "vgg16_bn", "m-cifarnet")
    """Networks for images of 32 x 32."""
    budget: float = 0.5
    """Share of the macs that the plan may use."""
    images: int = 1000
    """Images per evaluation."""
    rounds: int = 7
    """Timed rounds per network; the medians are shown."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


def measure(name: str, settings: Settings) -> list[str]:
    """One row of the table."""
    network = make_network(name, classes=10)
    images = torch.randn(settings.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dtype = number_format(network, images)
    batches = prepare_images(images, device="cpu", dtype=dtype).split(BATCH_SIZE)
    graph = trace(network, images[:1])
    plan = uniform_plan(graph, settings.budget)
    small = cut(network, graph, plan).to(memory_format=torch.channels_last)
    whole = network.to(memory_format=torch.channels_last)
    with masked(whole, graph, plan):
        seconds = take_turns(
            settings.rounds,
            {
                f"{which} {runner.__name__}": lambda _, net=net, runner=runner: outputs(net, batches, dtype, runner)
                for which, net in (("cut", small), ("masked", whole))
                for runner in (fused, plain)
            },
        )
    cells = []
    for runner in (fused, plain):
        fast, slow = (float(np.median(seconds[f"{which} {runner.__name__}"])) for which in ("cut", "masked"))
        cells += [f"{settings.images / fast:.0f}", f"{settings.images / slow:.0f}", f"{slow / fast:.2f}x"]
    share = graph.macs(plan) / float(graph.cost["macs"](graph.full))
    return [name, f"{share:.3f}", *cells]


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    torch.set_num_threads(settings.threads)
    show(
        f"Evaluation at {settings.budget} of the macs ({fast_format('cpu')}, median of {settings.rounds}, "
        f"{settings.threads} threads)",
        ["network", "macs left", "cut, images/s", "masked", "faster", "one by one: cut", "masked", "faster"],
        [measure(name, settings) for name in settings.networks],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
