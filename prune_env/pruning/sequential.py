"""Sequential refit: AMC's least squares, layer by layer on activations of the network that is already pruned.

Each consumer, in forward order, gets the weights with which the inputs it now really reads reproduce the dense
network's outputs (He et al., ECCV 2018, after the reconstruction of He et al., ICCV 2017). It sees the errors that
earlier layers left, which moments of the dense network cannot; the price is a forward pass per consumer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_env.pruning.activations import watching
from prune_env.pruning.consumer import Consumer, complement, consumers, oriented
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.moments import POSITIONS, MomentSum, ridged
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import dropped_axes

MAX_WIDTH = 4608
"""Largest window of a dense consumer, channels times taps: 512 channels of a 3x3 kernel."""


class _Reached(Exception):
    """The layer in question has been read: the rest of the forward pass is not needed."""


@torch.no_grad()
def sequential_refit(
    network: nn.Module,
    small: nn.Module,
    graph: LayerGraph,
    plan: Plan,
    images: Float[Tensor, "sample ..."],
    *,
    positions: int = POSITIONS,
    batch_size: int = 100,
) -> None:
    """Refit the consumers of a cut network in place, one after the other.

    Consumers that lost no input, transposed convolutions and windows wider than `MAX_WIDTH` are left as they are.

    Args:
        network: The dense network.
        small: The same network cut by `plan`.
        graph: The graph of both.
        plan: What is kept.
        images: Normalised training images.
        positions: Output positions taken from each image.
        batch_size: Images that run at once.
    """
    dropped = dropped_axes(graph, plan)
    found = consumers(network, graph.groups, images[:1], max_width=MAX_WIDTH)
    lost = {name for name, role in dropped if role == "in" and name in found and found[name].window}
    batches = images.split(batch_size)
    order = [layer.name for layer in graph.layers if layer.name in lost]
    targets = _targets(network, [found[name] for name in order], batches, positions)
    for name in order:
        _, outputs = dropped.get((name, "out"), (0, np.empty(0, dtype=np.int64)))
        wanted = targets.pop(name)
        kept = complement(outputs, wanted[0].shape[1])
        sums = MomentSum()
        for inputs, target in zip(_inputs(small, found[name], batches, positions, len(wanted)), wanted, strict=True):
            sums.add(torch.cat([inputs, target[:, kept]], dim=1))
        _solve(small, found[name], sums, centred=found[name].shifts(network))


def _targets(
    network: nn.Module, found: Sequence[Consumer], batches: Sequence[Tensor], positions: int
) -> dict[str, list[Tensor]]:
    """The dense outputs, less the bias, of every consumer, in the order of its calls: one pass for all."""
    targets: dict[str, list[Tensor]] = {consumer.name: [] for consumer in found}
    generators = {consumer.name: torch.Generator().manual_seed(0) for consumer in found}
    layouts = {consumer.name: consumer for consumer in found}

    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        inputs = layouts[name].samples(module, x.float(), limit=positions, generator=generators[name])
        targets[name].append(inputs @ layouts[name].matrix(oriented(module)).T.float())

    with watching(network, targets, observe):
        for batch in batches:
            network(batch)
    return targets


def _inputs(
    small: nn.Module, consumer: Consumer, batches: Sequence[Tensor], positions: int, calls: int
) -> Iterator[Float[Tensor, "sample column"]]:
    """What a consumer reads in the pruned network at the positions of its targets; the rest of a pass is skipped."""
    generator = torch.Generator().manual_seed(0)
    read: list[Tensor] = []

    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        read.append(consumer.samples(module, x.float(), limit=positions, generator=generator))
        if len(read) == calls // len(batches):
            raise _Reached

    with watching(small, (consumer.name,), observe):
        for batch in batches:
            with suppress(_Reached):
                small(batch)
            yield from read
            read.clear()


def _solve(small: nn.Module, consumer: Consumer, sums: MomentSum, *, centred: bool) -> None:
    """Ridge regression of the targets on the inputs, in place, with the ridge pulling towards the present weights."""
    shape = oriented(small.get_submodule(consumer.name))
    before = consumer.matrix(shape).double().cpu()
    width = before.shape[1]
    moment, mean = sums.moment(centred=centred), sums.mean()
    inputs, across = moment[:width, :width], moment[:width, width:]
    factor = torch.linalg.cholesky(ridged(inputs))
    change = torch.cholesky_solve(across - inputs @ before.T, factor).T
    shape += consumer.weight(change, shape).to(shape)
    if centred:
        consumer.shift(small, mean[width:] - (before + change) @ mean[:width])
