"""Merging sites: what a channel is made of, on which groups merging is exact, and the merge itself.

Nothing here chooses partners: given the matrix Z of a group, `absorb` adds what the pruned channels sent on to what
the kept ones send, W'_{i+1} = W_{i+1} x_2 Z_i (Kim et al., NeurIPS 2020). That is exact where a scaled copy of a
channel reaches every consumer as a scaled copy. `unmergeable` says where it does not, partly from the structure, and
for the rest by trying it: half the channels carry scaled copies of the others' noise, are merged away, and every
consumer must go on to compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from prune_env.pruning.activations import evaluating
from prune_env.pruning.consumer import complement, oriented
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import BATCH_NORMS, cut, dropped_axes

TOLERANCE = 1e-3
"""Allowed difference relative to the largest output of the same layer: what is wrong is off by about one."""
MAGNITUDES = (1.0, 100.0)
"""Sizes of the noise that is tried: small signals show a curve (GELU, SiLU), large ones a ceiling (ReLU6, tanh)."""
BEFORE_NORM, BEHIND_NORM = 3.0, 2.0
"""Scales of a copy; they differ, so that a channel that is read on both sides of its norm is found out."""
NOT_HOMOGENEOUS = (
    "a scaled copy of a channel does not reach the next layer as a scaled copy: what lies between is not positively "
    "homogeneous (as a ReLU is), or the channel is read both before and behind its norm"
)

Mixes = Mapping[str, Tensor]
"""Group name -> Z, `[kept, channel]`."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm in evaluation mode: gamma * (x - mean) / sqrt(var + eps) + beta, float64 on the CPU.

    Attributes:
        gamma: Scale.
        beta: Shift.
        mean: Running mean, less the bias of the layer before it, which moves it.
        var: Running variance.
        eps: Added to the variance.
    """

    gamma: Float[Tensor, "*channel"]
    beta: Float[Tensor, "*channel"]
    mean: Float[Tensor, "*channel"]
    var: Float[Tensor, "*channel"]
    eps: float

    def __getitem__(self, channels: Int64[Tensor, "*some"]) -> Norm:
        """The same for some channels, in the shape of the index."""
        return Norm(self.gamma[channels], self.beta[channels], self.mean[channels], self.var[channels], self.eps)


def positions(slot: Slot, channels: int) -> Int64[Tensor, "channel position"]:
    """Positions along a slot's axis by channel, rising; the k-th of one channel corresponds to the k-th of another."""
    return torch.from_numpy(slot.index[np.argsort(slot.unit, kind="stable")].reshape(channels, -1))


def filters(network: nn.Module, group: Group) -> Float[Tensor, "channel weight"]:
    """All weights that write a channel, float64 on the CPU; the bias is one more weight where no norm follows."""
    rows = []
    for slot in group.producers:
        module = network.get_submodule(slot.module)
        weight, bias = oriented(module).flatten(1), module.bias
        if isinstance(bias, Tensor) and not norms(network, group):
            weight = torch.cat([weight, bias.detach()[:, None]], dim=1)
        rows.append(weight.cpu()[positions(slot, group.channels)].flatten(1))
    return torch.cat(rows, dim=1).double()


def norms(network: nn.Module, group: Group) -> list[Slot]:
    """The carriers of a group that are BatchNorms."""
    carriers = [slot for slot in group.carriers if slot.role == "both"]
    return [slot for slot in carriers if isinstance(network.get_submodule(slot.module), BATCH_NORMS)]


def norm_of(network: nn.Module, group: Group) -> Norm | None:
    """The one norm of a group that `unfit` has nothing against, by channel; None where it has none."""
    if not norms(network, group):
        return None
    (slot,), (producer,) = norms(network, group), group.producers
    module, order = network.get_submodule(slot.module), positions(slot, group.channels)[:, 0]
    assert isinstance(module, BATCH_NORMS)

    def by_channel(tensor: Tensor | None, empty: float) -> Float[Tensor, " channel"]:
        if tensor is None:
            return torch.full((group.channels,), empty, dtype=torch.float64)
        return tensor.detach().double().cpu()[order]

    mean, bias = by_channel(module.running_mean, 0.0), network.get_submodule(producer.module).bias
    if isinstance(bias, Tensor):
        mean = mean - bias.detach().double().cpu()[positions(producer, group.channels)[:, 0]]
    return Norm(
        by_channel(module.weight, 1.0),
        by_channel(module.bias, 0.0),
        mean,
        by_channel(module.running_var, 1.0),
        module.eps,
    )


def unfit(network: nn.Module, group: Group) -> str | None:
    """Why the channels of a group cannot be merged, as far as the graph shows it."""
    names = [slot.module for slot in group.producers]
    if len(names) != 1:
        return f"written by {len(names)} layers ({', '.join(names)}), which a single scale cannot serve"
    for slot in (*group.producers, *group.carriers):
        if slot.role == "parameter":
            return f"each channel meets its own value of the parameter {slot.module}"
        module = network.get_submodule(slot.module)
        if slot.role == "both" and not isinstance(module, BATCH_NORMS):
            return f"passes through {slot.module} ({type(module).__name__}), which treats each channel in its own way"
        if slot.role == "both" and module.running_mean is None:
            return f"the norm {slot.module} has no running statistics"
        if len(slot.index) != group.channels:
            return f"a channel of it is several channels of {slot.module}"
    passed = [slot.module for slot in norms(network, group)]
    return f"passes through {len(passed)} norms ({', '.join(passed)})" if len(passed) > 1 else None


def unmergeable(network: nn.Module, graph: LayerGraph, example: Tensor) -> dict[str, str]:
    """The groups whose channels cannot be merged, each with the reason; a merge leaves them as they were cut.

    Args:
        network: The dense network; it is only read.
        graph: Its graph.
        example: One input with its batch axis; only its shape matters.
    """
    reasons = {group.name: unfit(network, group) for group in graph.groups}
    fit = [group for group in graph.groups if reasons[group.name] is None]
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    return found | dict.fromkeys(_inexact(network, graph, fit, example), NOT_HOMOGENEOUS)


@torch.no_grad()
def absorb(network: nn.Module, small: nn.Module, graph: LayerGraph, plan: Plan, mixes: Mixes) -> None:
    """Give the consumers of a cut network W' = W x_2 Z of the dense weights W, in place.

    Args:
        network: The dense network.
        small: The same network cut by `plan`.
        graph: The graph of both.
        plan: What is kept.
        mixes: Z of every group that is merged; its rows follow the plan's kept channels.
    """
    dropped, none = dropped_axes(graph, plan), (0, np.empty(0, dtype=np.int64))
    for name, mix in mixes.items():
        group = graph.group(name)
        for slot in group.consumers:
            dense, own = oriented(network.get_submodule(slot.module)), oriented(small.get_submodule(slot.module))
            outputs = complement(dropped.get((slot.module, "out"), none)[1], len(dense))
            inputs = complement(dropped.get((slot.module, "in"), none)[1], dense.shape[1])
            read = positions(slot, group.channels)
            # Where the kept positions went when the axis, which other groups may share, became shorter.
            place = torch.searchsorted(inputs, read[list(plan.keep[name])])
            into, channel = mix.nonzero(as_tuple=True)
            scales = mix[into, channel].repeat_interleave(read.shape[1]).to(dense)
            columns = dense.index_select(0, outputs.to(dense.device)).index_select(
                1, read[channel].flatten().to(dense.device)
            )
            columns *= scales.view(1, -1, *[1] * (dense.dim() - 2))
            own.index_fill_(1, place.flatten().to(own.device), 0)
            own.index_add_(1, place[into].flatten().to(own.device), columns)


def _inexact(network: nn.Module, graph: LayerGraph, groups: Sequence[Group], example: Tensor) -> list[str]:
    """The groups on which merging scaled copies changes what consumers compute; found by halving."""
    if not groups or _exact(network, graph, groups, example):
        return []
    if len(groups) == 1:
        return [groups[0].name]
    middle = len(groups) // 2
    return [name for half in (groups[:middle], groups[middle:]) for name in _inexact(network, graph, half, example)]


def _exact(network: nn.Module, graph: LayerGraph, groups: Sequence[Group], example: Tensor) -> bool:
    """Whether consumers compute the same after every second channel, a copy of the one before, was merged into it."""
    twin = cut(network, graph, Plan.full(graph))
    for slot in (slot for group in groups for slot in norms(twin, group)):
        _make_plain(twin.get_submodule(slot.module))
    plan = Plan({group.name: tuple(range(0, group.channels, 2)) for group in groups})
    small = cut(twin, graph, plan)
    absorb(twin, small, graph, plan, {group.name: _paired(group.channels) for group in groups})
    lost = {name: axis[1] for (name, role), axis in dropped_axes(graph, plan).items() if role == "out"}
    for magnitude in MAGNITUDES:
        whole, part = (_outputs(one, groups, example, magnitude) for one in (twin, small))
        for name, tensors in whole.items():
            for wanted, found in zip(tensors, part[name], strict=True):
                axis = _channel_axis(network.get_submodule(name), wanted)
                kept = complement(lost.get(name, np.empty(0, dtype=np.int64)), wanted.shape[axis])
                wanted = wanted.index_select(axis, kept.to(wanted.device))
                if not bool((wanted - found).abs().max() <= TOLERANCE * wanted.abs().max().clamp_min(1e-30)):
                    return False
    return True


@torch.no_grad()
def _make_plain(norm: nn.Module) -> None:
    """A norm that does nothing to even channels, and to odd ones what makes three times the input twice the output."""
    assert isinstance(norm, BATCH_NORMS)
    norm.get_buffer("running_mean").zero_()
    var = norm.get_buffer("running_var")
    var.fill_(1.0)[1::2] = (BEFORE_NORM / BEHIND_NORM) ** 2
    var -= norm.eps
    if norm.weight is not None:
        norm.weight.fill_(1.0)
        norm.bias.zero_()


def _paired(channels: int) -> Float[Tensor, "kept channel"]:
    """Z of channels of which every second one is merged into the one before."""
    channel = torch.arange(channels)
    mix = torch.zeros((channels + 1) // 2, channels, dtype=torch.float64)
    mix[channel // 2, channel] = torch.where(channel % 2 == 0, 1.0, BEHIND_NORM).double()
    return mix


def _outputs(network: nn.Module, groups: Sequence[Group], example: Tensor, magnitude: float) -> dict[str, list[Tensor]]:
    """What the consumers of groups compute, call by call, while their producers write noise.

    Noise in place of what the producer computes: the signals of a network may be too weak to tell, or all dead.
    """
    found: dict[str, list[Tensor]] = {slot.module: [] for group in groups for slot in group.consumers}

    def record(name: str) -> Callable[..., None]:
        # Cloned, because a rectifier in place would change what is compared.
        return lambda _, __, output: found[name].append(output.clone())

    def replace(group: Group) -> Callable[..., Tensor]:
        scale = BEFORE_NORM if norms(network, group) else BEHIND_NORM
        return lambda module, _, output: magnitude * _noise(output, _channel_axis(module, output), group, scale)

    with ExitStack() as stack:
        for name in found:
            stack.callback(network.get_submodule(name).register_forward_hook(record(name)).remove)
        for group in groups:
            producer = network.get_submodule(group.producers[0].module)
            stack.callback(producer.register_forward_hook(replace(group)).remove)
        with evaluating(network), torch.no_grad():
            network(example)
    return found


def _noise(output: Tensor, axis: int, group: Group, scale: float) -> Tensor:
    """Noise in which every second channel is a scaled copy of the one before; without those, where they were cut."""
    even = (group.channels + 1) // 2
    shape = list(output.shape)
    shape[axis] = even
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).to(output)
    if output.shape[axis] == even:
        return noise
    both = torch.stack([noise, scale * noise], dim=axis + 1).flatten(axis, axis + 1)
    return both.narrow(axis, 0, group.channels).to(output)


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(module, nn.Linear) else 1
