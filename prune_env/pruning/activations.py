"""Watching what modules read while a network runs, with the network handed back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prune_env.pruning.graph import Group

Observer = Callable[[str, nn.Module, Tensor], None]
"""Called with the module's name, the module and the tensor it is about to read."""
Level = Callable[[Tensor, nn.Module], Tensor]
"""(what a module reads, the module) -> `[sample, position, channel]`, what each channel amounts to."""


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode; every module's own mode returns on exit."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield network.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def watching(network: nn.Module, names: Iterable[str], observe: Observer) -> Iterator[nn.Module]:
    """Evaluation mode with an observer in front of the named modules; mode and hooks are restored on exit.

    Args:
        network: The network to run inside the context.
        names: Dotted module names; one module under two names is watched under the first.
        observe: Called before each watched module with what it reads.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(network))
        watched: set[int] = set()
        for name in names:
            module = network.get_submodule(name)
            if id(module) in watched:
                continue
            watched.add(id(module))
            hook = module.register_forward_pre_hook(partial(_told, observe, name))
            stack.callback(hook.remove)
        yield network


def _told(observe: Observer, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    observe(name, module, args[0])


def channels_last(x: Tensor, module: nn.Module) -> Float[Tensor, "sample position channel"]:
    """A module's input with the axis that its weights run over moved to the end and the positions flattened.

    A convolution reads its channels at axis 1 of `[sample, channel, ...]`, a linear layer its features at the last
    axis of `[sample, ..., feature]`.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(x.shape[0], -1, x.shape[-1])
    return x.flatten(2).transpose(1, 2)


def magnitude(x: Tensor, module: nn.Module) -> Float[Tensor, "sample position channel"]:
    """Absolute values."""
    return channels_last(x, module).abs().float()


def pooled(
    network: nn.Module,
    groups: Sequence[Group],
    images: Float[Tensor, "sample ..."],
    *,
    batch_size: int = 100,
    level: Level = magnitude,
) -> dict[str, Float[Tensor, "sample channel"]]:
    """Per image, the mean level (absolute value) of what the consumers of each group read, by channel.

    The mean is over the positions of a map, the positions of a channel, and the consumers; it is zero for a channel
    that no watched module reads.

    Args:
        network: The dense network; mode and random state stay as they are.
        groups: Its groups.
        images: Normalised images.
        batch_size: Images that run at once.
        level: What is averaged.
    """
    read: dict[str, list[Tensor]] = {slot.module: [] for group in groups for slot in group.consumers}
    size = 0

    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        # Windows and tokens may be folded into the batch axis; they count as positions.
        levels = level(x, module)
        read[name].append(levels.reshape(size, -1, levels.shape[-1]).mean(1).cpu())

    total: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with watching(network, read, observe), torch.no_grad():
        for batch in images.split(batch_size):
            size = len(batch)
            network(batch)
            for group in groups:
                total[group.name].append(_by_channel(read, group, size))
            for levels in read.values():
                levels.clear()
    return {name: torch.cat(parts) for name, parts in total.items()}


def _by_channel(read: dict[str, list[Tensor]], group: Group, size: int) -> Float[Tensor, "sample channel"]:
    """Mean level of each channel over everything that reads it."""
    total, count = torch.zeros(size, group.channels), torch.zeros(group.channels)
    for slot in group.consumers:
        index, unit = torch.from_numpy(slot.index), torch.from_numpy(slot.unit)
        for level in read[slot.module]:
            total.index_add_(1, unit, level[:, index])
            count.index_add_(0, unit, torch.ones(len(unit)))
    return total / count.clamp_min(1)
