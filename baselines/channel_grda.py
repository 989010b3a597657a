"""gRDA on whole channels: an extension of this project to directional pruning, in no part the paper's.

Chao et al. (NeurIPS 2020) threshold every weight for itself (`baselines.grda`). Here all that a channel of a pruning
group has in some parameters is thresholded together, and vanishes together:

    w_j = v_j max(0, 1 - g_n / rms(v_j)),        rms(v_j) = ||v_j / unit||_2 / sqrt(d_j), d_j entries,

which is a group lasso's proximal step, and gRDA itself where d_j = unit = 1. Units make layers comparable under one
threshold: a filter is measured in the deviation that He's initialisation gives it, which follows from shapes alone.
Everything else is plain SGD.

    target     entries of a channel                                                        unit
    scales     the scales of all BatchNorms on the group                                   1
    filters    what all its producers write it with; biases; BatchNorm scales, shifts      sqrt(2 / fan-in); 1; 1

Behind a BatchNorm the size of a filter is free: to shrink it changes nothing until it is zero. Hence the scales are in
both targets. What a dead channel of `scales` still says is its shift; a dead one of `filters` has none. Where scales at
zero would leave a channel something that differs from place to place (no norm, a norm on some of the layers that write
a residual stream, a squeeze-and-excitation behind it), its group has `filters` instead; it is tried on random weights.

Others have published a structured form (Li et al., "Structured Directional Pruning", 2021, arXiv 2107.05328: AltSDP),
which is not followed here. AutoFIS (KDD 2020) runs gRDA on gates alone, the nearest to `scales`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from baselines.dead_channels import Dead, readings
from baselines.grda import GRDA, strength
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.surgery import BATCH_NORMS, tensor_axes


@dataclass(frozen=True, eq=False)
class Part:
    """What a channel has in one parameter.

    Attributes:
        parameter: Dotted name.
        slot: Positions along the axis, and the channel of each.
        axis: The axis of the parameter that the positions run along.
        width: Entries at one position.
        unit: What its entries are measured in.
    """

    parameter: str
    slot: Slot
    axis: int
    width: int
    unit: float = 1.0

    def rows(self, tensor: Tensor) -> Float[Tensor, "position entry"]:
        """A tensor of the parameter's shape with its positions first."""
        return tensor.movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1)

    def index(self, device: torch.device) -> Int64[Tensor, " position"]:
        """The positions."""
        return torch.from_numpy(self.slot.index).to(device)

    def channel(self, device: torch.device) -> Int64[Tensor, " position"]:
        """The channel of each position."""
        return torch.from_numpy(self.slot.unit).to(device)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Channels, and all that each of them has in some parameters.

    Attributes:
        name: The pruning group.
        channels: Number of channels.
        parts: Where their entries are.
    """

    name: str
    channels: int
    parts: tuple[Part, ...]

    @cached_property
    def entries(self) -> Float[Tensor, " channel"]:
        """d, entries of each channel."""
        counts = (np.bincount(part.slot.unit, minlength=self.channels) * part.width for part in self.parts)
        return torch.from_numpy(sum(counts)).double()

    def rms(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " channel"]:
        """||v_j / unit||_2 / sqrt(d_j) of each channel, float64 on the tensors' device; 0 exactly if all entries are.

        Args:
            tensors: Name -> the parameter, or a tensor of its shape.
        """
        device = tensors[self.parts[0].parameter].device
        total = torch.zeros(self.channels, dtype=torch.float64, device=device)
        for part in self.parts:
            # The norm scales before it squares: tiny entries do not vanish.
            norm = torch.linalg.vector_norm(part.rows(tensors[part.parameter].detach()), dim=1, dtype=torch.float64)
            total.index_add_(0, part.channel(device), (norm / part.unit).square()[part.index(device)])
        return (total / self.entries.to(device)).sqrt()


class GroupGRDA(GRDA):
    """GRDA with one threshold for all entries of a channel; parameters without channels are plain SGD.

    Args:
        network: Whose parameters are trained.
        bundles: The channels that are thresholded; no entry belongs to two of them.
        lr: Learning rate gamma.
        c: Size of the threshold.
        mu: Its growth with the number of steps.

    Raises:
        ValueError: A constant that is not allowed; names it.
    """

    def __init__(
        self,
        network: nn.Module,
        bundles: Sequence[Bundle],
        *,
        lr: float | int,
        c: float | int,
        mu: float | int,
    ) -> None:
        self._bundles = tuple(bundles)
        names = {part.parameter for bundle in bundles for part in bundle.parts}
        parameters = dict(network.named_parameters())
        self._bundled = {name: parameter for name, parameter in parameters.items() if name in names}
        others = [parameter for name, parameter in parameters.items() if name not in names]
        groups = [{"params": [*self._bundled.values()]}, {"params": others, "c": 0.0}]
        super().__init__([group for group in groups if group["params"]], lr=lr, c=c, mu=mu)

    def _write(self, moved: Sequence[nn.Parameter]) -> None:
        bundled = {id(parameter) for parameter in self._bundled.values()}
        super()._write([parameter for parameter in moved if id(parameter) not in bundled])
        memory = {name: self._memory(parameter) for name, parameter in self._bundled.items()}
        duals = {name: one["dual"] for name, one in memory.items()}
        # Positions that no bundle names, say channels that must stay, are plain SGD.
        factors: dict[str, Tensor] = {}
        for bundle in self._bundles:
            threshold = max(float(memory[part.parameter]["threshold"]) for part in bundle.parts)
            rms = bundle.rms(duals)
            # NaN is not above the threshold, but NaN times 0 is NaN: it stays for the training to notice.
            kept = torch.where(rms > threshold, 1 - threshold / rms, 0.0)
            for part in bundle.parts:
                dual = duals[part.parameter]
                factor = factors.setdefault(part.parameter, dual.new_ones(dual.shape[part.axis]))
                factor[part.index(dual.device)] = kept[part.channel(dual.device)].to(dual.dtype)
        axes = {part.parameter: part.axis for bundle in self._bundles for part in bundle.parts}
        for name, factor in factors.items():
            shape = [-1 if axis == axes[name] else 1 for axis in range(duals[name].dim())]
            self._bundled[name].copy_(duals[name] * factor.view(shape))


def scales(network: nn.Module, group: Group) -> tuple[Part, ...]:
    """Scales of the BatchNorms that carry a group."""
    return _parts(network, _norms(network, group), names=("weight",))


def filters(network: nn.Module, group: Group) -> tuple[Part, ...]:
    """Filters and biases of a group's producers, scales and shifts of its BatchNorms."""
    weights = _parts(network, group.producers, names=("weight",))
    scaled = (replace(part, unit=math.sqrt(2 / part.width)) for part in weights)
    rest = _parts(network, group.producers, names=("bias",))
    return (*scaled, *rest, *_parts(network, _norms(network, group), names=("weight", "bias")))


TARGETS: dict[str, Callable[[nn.Module, Group], tuple[Part, ...]]] = {"scales": scales, "filters": filters}


def _norms(network: nn.Module, group: Group) -> tuple[Slot, ...]:
    carriers = (slot for slot in group.carriers if slot.role == "both")
    return tuple(slot for slot in carriers if isinstance(network.get_submodule(slot.module), BATCH_NORMS))


def _parts(network: nn.Module, slots: Sequence[Slot], *, names: Sequence[str]) -> tuple[Part, ...]:
    """What the channels of some axes have in the parameters of these names."""
    found = []
    for slot in slots:
        module = network.get_submodule(slot.module)
        for name, axis in tensor_axes(module, slot.role):
            tensor = getattr(module, name, None)
            if name in names and isinstance(tensor, nn.Parameter):
                path = f"{slot.module}.{name}" if slot.module else name
                found.append(Part(path, slot, axis, tensor.numel() // tensor.shape[axis]))
    return tuple(found)


def bundles(
    network: nn.Module, graph: LayerGraph, example: Float[Tensor, "1 ..."], *, target: str
) -> tuple[Bundle, ...]:
    """What the channels of every group are thresholded by; it follows from the architecture alone.

    Args:
        network: It is only read.
        graph: Its graph.
        example: One normalised input; only its shape matters.
        target: A name of `TARGETS`.
    """
    twin = _random_twin(network)
    found = []
    for group in graph.groups:
        parts = TARGETS[target](network, group)
        chosen = parts if _silences(twin, group, parts, example) else filters(network, group)
        found.append(Bundle(group.name, group.channels, chosen))
    return tuple(found)


@torch.no_grad()
def _random_twin(network: nn.Module) -> nn.Module:
    """A copy with other weights: whether a path can carry a signal must not depend on what training left of it."""
    twin, draw = copy.deepcopy(network).float(), np.random.default_rng(0)
    for parameter in twin.parameters():
        width = parameter.numel() // max(len(parameter), 1) if parameter.dim() > 1 else 0
        values = draw.standard_normal(parameter.shape) * (2 / width) ** 0.5 if width else draw.uniform(0.5, 1.5)
        parameter.copy_(torch.as_tensor(values))
    for module in twin.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_running_stats()
    return twin


@torch.no_grad()
def _silences(network: nn.Module, group: Group, parts: Sequence[Part], example: Tensor) -> bool:
    """Whether channels that have nothing in these parts say the same everywhere; the network is left as it was.

    Every second channel is tried: what the others do (to a gate on all of them, say) must make no difference.
    """
    gone = np.arange(group.channels) % 2 == 0
    tensors = dict(network.named_parameters())
    before = {part.parameter: tensors[part.parameter].clone() for part in parts}
    for part in parts:
        positions = torch.from_numpy(part.slot.positions(gone)).to(example.device)
        tensors[part.parameter].index_fill_(part.axis, positions, 0)
    read = readings(network, [slot.module for slot in group.consumers], example)
    for name, value in before.items():
        tensors[name].copy_(value)
    return all(bool(read[slot.module].constant[slot.positions(gone)].all()) for slot in group.consumers)


def norms(network: nn.Module, channels: Sequence[Bundle]) -> dict[str, Float[np.ndarray, " channel"]]:
    """Group name -> rms of each channel, in the bundle's units."""
    tensors = dict(network.named_parameters())
    return {bundle.name: bundle.rms(tensors).cpu().numpy() for bundle in channels}


def dead(network: nn.Module, channels: Sequence[Bundle]) -> Dead:
    """Group name -> whether nothing is left of each channel."""
    return {name: rms == 0 for name, rms in norms(network, channels).items()}


def closed_form(
    there: Float[np.ndarray, " channel"], *, share: int | float, rates: Sequence[float], mu: int | float
) -> float:
    """The c for which the last threshold lies at a quantile of the norms: c = g_T / sum_n rise_n.

    Args:
        there: Norms of all channels at the start.
        share: Share of them to end at zero, from 0 below 1; exact where duals do not move.
        rates: Learning rate of each step.
        mu: Growth of the threshold.
    """
    ordered, gone = np.sort(there), round(share * len(there))
    if gone == 0:
        return 0.0
    above = ordered[min(gone, len(ordered) - 1)]
    return float(ordered[gone - 1] + above) / 2 / strength(rates, mu=mu)
