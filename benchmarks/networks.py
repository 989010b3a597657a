"""What can be pruned in each network: groups, layers that stay whole and why, smallest reachable share of macs.

Writes the table of `docs/networks.md`; every row is traced and verified anew, with random weights.

    python -m benchmarks.networks > docs/networks.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network


@dataclass(frozen=True)
class Input:
    """What a network is built for."""

    classes: int = 10
    channels: int = 3
    side: int = 32


PHOTO = Input(classes=1000, side=224)
NETWORKS = {
    "cnn": Input(channels=1, side=8),
    "lenet300100": Input(channels=1, side=28),
    "m-cifarnet": Input(),
    "resnet20": Input(),
    "resnet32": Input(),
    "resnet44": Input(),
    "resnet56": Input(),
    "resnet110": Input(),
    "vgg16_bn": Input(),
    "wrn-40-4": Input(),
    "torchvision:resnet18": PHOTO,
    "torchvision:resnet50": PHOTO,
    "torchvision:resnext50_32x4d": PHOTO,
    "torchvision:wide_resnet50_2": PHOTO,
    "torchvision:vgg11_bn": PHOTO,
    "torchvision:vgg16": PHOTO,
    "torchvision:alexnet": PHOTO,
    "torchvision:squeezenet1_1": PHOTO,
    "torchvision:densenet121": PHOTO,
    "torchvision:googlenet": PHOTO,
    "torchvision:inception_v3": Input(classes=1000, side=299),
    "torchvision:mobilenet_v2": PHOTO,
    "torchvision:mobilenet_v3_small": PHOTO,
    "torchvision:mnasnet0_5": PHOTO,
    "torchvision:shufflenet_v2_x0_5": PHOTO,
    "torchvision:efficientnet_b0": PHOTO,
    "torchvision:regnet_y_400mf": PHOTO,
    "torchvision:convnext_tiny": PHOTO,
    "torchvision:vit_b_16": PHOTO,
}

HEADER = """\
# Networks

What can be pruned in each network of the zoo, and in networks of torchvision. This page is written by
`python -m benchmarks.networks > docs/networks.md`; every row is traced anew, and a group is in it only if its masked
and its cut network agree.

- **groups**: sets of channels that live or die together, each one step of an episode.
- **whole**: convolution and linear layers whose outputs are never pruned, of all such layers.
- **least macs**: the share of the macs that is left with one channel in every group: the smallest budget that can be
  reached.

| network | input | macs [M] | params [M] | groups | whole | least macs |
|---|---|---|---|---|---|---|
"""


def row(name: str, shape: Input, graph: LayerGraph) -> str:
    """One line of the table."""
    macs, params = (float(graph.cost[resource](graph.full)) for resource in ("macs", "params"))
    least = float(graph.cost["macs"](np.ones_like(graph.full))) / macs
    cells = [
        f"`{name}`",
        f"{shape.channels} x {shape.side} x {shape.side}",
        f"{macs / 1e6:,.1f}",
        f"{params / 1e6:,.2f}",
        str(len(graph.groups)),
        f"{len(graph.fixed)} of {len(graph.layers)}",
        f"{least:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def reasons(fixed: Mapping[str, str]) -> Iterator[str]:
    """The layers that stay whole, those with one reason together."""
    layers: dict[str, list[str]] = {}
    for layer, reason in fixed.items():
        layers.setdefault(reason, []).append(layer)
    for reason, names in layers.items():
        shown = ", ".join(f"`{name}`" for name in names[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"- {shown}{more}: {reason}"


def main() -> None:
    """Trace all networks and print the page."""
    rows, whole, simple = [], [], []
    for name, shape in track(NETWORKS.items(), console=Console(file=sys.stderr), description="tracing"):
        network = make_network(name, classes=shape.classes, channels=shape.channels, side=shape.side)
        graph = trace(network, torch.randn(1, shape.channels, shape.side, shape.side))
        rows.append(row(name, shape, graph))
        if len(graph.fixed) == 1:
            simple.append(f"`{name}`")
        else:
            whole += [f"\n### {name}\n", *reasons(graph.fixed)]
    print(HEADER + "\n".join(rows))
    print("\n## What stays whole, and why\n")
    print(f"Only the layer that writes the network's output: {', '.join(simple)}.")
    print("\n".join(whole))


if __name__ == "__main__":
    main()
