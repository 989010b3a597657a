"""What a channel-gated network does and costs: macs of every image, open gates, and a static score made of them.

The method is in `baselines.channel_gating`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from baselines.channel_gating_layers import ChannelGatedNetwork, GatedConvolution, Gating, attach
from baselines.potential import Curve, kept, ranked
from prune_env.envs.dynamics import Problem
from prune_env.number_format import autocast
from prune_env.pruning.activations import watching
from prune_env.pruning.gating.measurement import Habits, RuntimeMeasurement
from prune_env.pruning.graph import Group
from prune_env.pruning.importance import IMPORTANCES, Criterion, Evidence
from prune_env.pruning.measure import count_params, evaluating, prepare_images

BATCH = 128
CALIBRATION = 512
"""Images that the statistics of untrained gates, and their energy, are taken from."""


@dataclass(frozen=True, eq=False)
class GatingCost:
    """Macs of an image in closed form: the dense network's, less what closed gates save.

    Attributes:
        dense: Macs of the dense network.
        rest: Per gated layer, `[channel]` macs at one position that a closed gate saves: k^2 inputs beside the base.
        positions: Output positions of each gated layer.
    """

    dense: int
    rest: tuple[Int64[np.ndarray, " _"], ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, gated: ChannelGatedNetwork) -> GatingCost:
        """The cost of a gated network; norms, comparisons and merging are no macs."""
        places = [gated.graph.layer(name) for name in gated.names]
        pairs = zip(places, gated.layers, strict=True)
        rest = tuple(math.prod(place.kernel) * (~layer.base).sum(1).cpu().numpy() for place, layer in pairs)
        dense = int(gated.graph.cost["macs"](gated.graph.full))
        return cls(dense, rest, tuple(place.positions for place in places))

    def macs(self, opened: Sequence[Int64[np.ndarray, "image _"]]) -> Float[np.ndarray, " image"]:
        """Dynamic macs of images.

        Args:
            opened: Per gated layer, positions of each channel at which the gate was open.
        """
        layers = zip(self.rest, self.positions, opened, strict=True)
        saved = sum((positions - count) @ rest for rest, positions, count in layers)
        return self.dense - np.asarray(saved, dtype=np.float64)

    @property
    def least(self) -> int:
        """Macs with every gate closed."""
        pairs = zip(self.rest, self.positions, strict=True)
        return self.dense - sum(positions * int(rest.sum()) for rest, positions in pairs)


@dataclass(frozen=True, eq=False)
class GatingMeasurement(RuntimeMeasurement):
    """The usual measurement of runtime pruning, and how far gates open. A channel is active where any position opens.

    Attributes:
        opened: Per gated layer, the share of gates that are open.
        closed: Per gated layer, the share of its channels that are closed at every position, in the mean over images.
    """

    opened: Sequence[float] = ()
    closed: Sequence[float] = ()

    def row(self) -> dict[str, object]:
        """The measurement as JSON can hold it."""
        own = {"open_gates": [float(share) for share in self.opened]}
        return {**super().row(), **own, "closed_channels": [float(share) for share in self.closed]}


@contextmanager
def counted(gated: ChannelGatedNetwork) -> Iterator[list[list[np.ndarray]]]:
    """Of the forward passes inside: per gated layer, for each batch `[sample, channel]` positions with an open gate."""
    counts: list[list[np.ndarray]] = [[] for _ in gated.names]

    def count(own: list[np.ndarray]) -> Callable[..., None]:
        return lambda module, args, gates: own.append(gates.flatten(2).sum(2).long().cpu().numpy())

    pairs = zip(gated.layers, counts, strict=True)
    handles = [layer.gate.register_forward_hook(count(own)) for layer, own in pairs]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def measure_gating(
    gated: ChannelGatedNetwork, batches: Iterable[tuple[Tensor, Tensor]], *, dtype: torch.dtype = torch.float32
) -> GatingMeasurement:
    """Run a split through a gated network.

    Args:
        gated: The network.
        batches: Normalised images and their classes.
        dtype: Number format of the forward pass.
    """
    cost, habits, device = GatingCost.of(gated), Habits(len(gated.names)), gated.thresholds[0].device
    right, loss, images = 0, 0.0, 0
    with counted(gated) as counts, evaluating(gated), torch.inference_mode(), autocast(device, dtype):
        for inputs, labels in batches:
            answer = labels.to(device)
            logits = gated(prepare_images(inputs, device=device, dtype=torch.float32)).float()
            right += int((logits.argmax(1) == answer).sum())
            loss += float(functional.cross_entropy(logits, answer, reduction="sum"))
            images += len(labels)
            for at, own in enumerate(counts):
                habits.note(at, torch.from_numpy(own[-1] > 0))
    opened = [np.concatenate(own) for own in counts]
    return GatingMeasurement(
        accuracy=right / images,
        loss=loss / images,
        macs=cost.macs(opened),
        params=count_params(gated),
        dense_macs=cost.dense,
        dense_params=int(gated.graph.cost["params"](gated.graph.full)),
        varying=[count / own.shape[1] for count, own in zip(habits.varying, opened, strict=True)],
        opened=[float(own.mean()) / positions for own, positions in zip(opened, cost.positions, strict=True)],
        closed=[float((own == 0).mean()) for own in opened],
    )


def open_share(
    gated: ChannelGatedNetwork, groups: Sequence[Group], images: Float[Tensor, "image ..."]
) -> dict[str, Float[Tensor, " channel"]]:
    """How often the gates of a channel are open, for groups that a gated convolution writes: a static surrogate.

    Not the paper's, which removes no channel: a channel that seldom opens adds little to what its base knows already.

    Args:
        gated: The network, trained.
        groups: Groups of the dense network; the result has those with a gated producer.
        images: Normalised images.
    """
    with counted(gated) as counts, evaluating(gated):
        for batch in images.split(BATCH):
            gated(batch)
    pairs = zip(gated.names, counts, GatingCost.of(gated).positions, strict=True)
    shares = {name: np.concatenate(own).mean(0) / positions for name, own, positions in pairs}
    found = {}
    for group in groups:
        writers = [slot for slot in group.producers if slot.module in shares]
        if writers:
            unit = np.concatenate([slot.unit for slot in writers])
            own = np.concatenate([shares[slot.module][slot.index] for slot in writers])
            mean = np.bincount(unit, own, group.channels) / np.bincount(unit, minlength=group.channels)
            found[group.name] = torch.from_numpy(mean).float()
    return found


def open_share_importance(gated: ChannelGatedNetwork) -> Criterion:
    """The surrogate as an `Importance`; groups without a gated producer are scored by l1."""

    def rank(evidence: Evidence) -> dict[str, Tensor]:
        rest = IMPORTANCES["l1"].rank(evidence)
        return {**rest, **open_share(gated, evidence.groups, evidence.batch[0])}

    return Criterion(rank)


def gated_energy(
    gated: ChannelGatedNetwork, images: Float[Tensor, "image ..."]
) -> dict[str, Float[Tensor, " channel"]]:
    """What open gates add: gated convolution -> mean of (d Y_r)^2 of each output channel, over images and positions.

    Args:
        gated: The network.
        images: Normalised images.
    """
    found = {
        name: torch.zeros(len(own), dtype=torch.float64)
        for name, own in zip(gated.names, gated.thresholds, strict=True)
    }

    def observe(name: str, layer: nn.Module, x: Tensor) -> None:
        assert isinstance(layer, GatedConvolution)
        base = layer.partial(x)
        added = layer.gate(layer.base_norm(base)) * (layer.convolution(x) - base)
        found[name] += added.square().flatten(2).mean(2).sum(0).double().cpu() / len(images)

    with watching(gated.network, gated.names, observe), torch.no_grad():
        for batch in images.split(BATCH):
            gated.network(batch)
    return found


def energy_kept(problem: Problem) -> dict[str, Curve]:
    """For shaping: the share of each group's gated energy, sum_c E[(d_c Y_r,c)^2], that the kept channels carry.

    An extension, not in the paper. The gates are not trained: they are as training begins, on the dense network, with
    thresholds of 0 and statistics of the calibration images. Of groups that no gated convolution writes nothing is
    known.

    Raises:
        ValueError: The network has no convolution that can be gated.
    """
    images = problem.evaluator.calibration[:CALIBRATION]
    gated = attach(problem.evaluator.network, problem.graph, images[:1], Gating()).eval()
    gated.calibrate(images)
    energy = {name: own.numpy() for name, own in gated_energy(gated, images).items()}
    curves = {}
    for group in problem.graph.groups:
        writers = [slot for slot in group.producers if slot.module in energy]
        if writers:
            own = sum(np.bincount(slot.unit, energy[slot.module][slot.index], group.channels) for slot in writers)
            curves[group.name] = kept(np.asarray(own)[ranked(problem, group)])
    return curves
