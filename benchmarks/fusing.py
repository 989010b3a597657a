"""Evaluating a pruned network: convolution, norm, addition and rectifier as one operation, against one by one.

The fused side pays for the fusing, as every measurement does.

    python -m benchmarks.fusing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks.timing import show, take_turns, uniform_plan
from prune_env.number_format import FORMATS, autocast, fast_format
from prune_env.pruning.fusion import fused
from prune_env.pruning.measure import BATCH_SIZE, evaluating, prepare_images
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network


@dataclass(frozen=True)
class Settings:
    """Fused against plain."""

    networks: tuple[str, ...] = ("resnet20", "resnet56", "vgg16_bn", "m-cifarnet")
    """Networks for images of 32 x 32."""
    formats: tuple[str, ...] = tuple(FORMATS)
    """Number formats."""
    budget: float = 0.5
    """Share of the macs that the plan may use."""
    images: int = 2000
    """Images per evaluation."""
    rounds: int = 5
    """Timed rounds per network; the medians are shown."""
    threads: int = torch.get_num_threads()
    """CPU threads."""


Runner = Callable[[nn.Module, Tensor, torch.dtype], nn.Module]
"""(network, first images, format) -> what runs in its place."""


def plain(network: nn.Module, images: Tensor, dtype: torch.dtype) -> nn.Module:
    """The network as it is, one operation after the other."""
    return network


def outputs(network: nn.Module, batches: tuple[Tensor, ...], dtype: torch.dtype, runner: Runner) -> Tensor:
    """Logits of all batches, as a meter gets them."""
    with evaluating(network), torch.inference_mode(), autocast("cpu", dtype):
        forward = runner(network, batches[0], dtype)
        return torch.cat([forward(batch).float() for batch in batches])


def measure(name: str, form: str, settings: Settings) -> list[str]:
    """One row of the table."""
    network, dtype = make_network(name, classes=10), FORMATS[form]
    images = torch.randn(settings.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    graph = trace(network, images[:1])
    small = cut(network, graph, uniform_plan(graph, settings.budget)).to(memory_format=torch.channels_last)
    batches = prepare_images(images, device="cpu", dtype=dtype).split(BATCH_SIZE)
    seconds = take_turns(
        settings.rounds,
        {runner.__name__: lambda _, runner=runner: outputs(small, batches, dtype, runner) for runner in (plain, fused)},
    )
    slow, fast = (float(np.median(seconds[which])) for which in ("plain", "fused"))
    theirs, ours = (outputs(small, batches, dtype, runner) for runner in (plain, fused))
    apart = float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
    rates = [f"{settings.images / taken:.0f}" for taken in (slow, fast)]
    return [name, form, *rates, f"{slow / fast:.2f}x", f"{apart:.1e}"]


def main(settings: Settings) -> None:
    """Time all networks and print the table."""
    torch.set_num_threads(settings.threads)
    show(
        f"Evaluation at {settings.budget} of the macs ({fast_format('cpu')} is the fast format here; median of "
        f"{settings.rounds}, {settings.threads} threads)",
        ["network", "format", "plain, images/s", "fused, images/s", "faster", "outputs apart"],
        [measure(name, form, settings) for name in settings.networks for form in settings.formats],
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
