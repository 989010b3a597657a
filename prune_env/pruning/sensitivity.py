"""Empirical sensitivities: the largest share that a channel has in any pre-activation of the layers that read it.

Liebenwein, Baykal, Lang, Feldman, Rus, "Provable Filter Pruning for Efficient Neural Networks", ICLR 2020
(https://arxiv.org/abs/1911.07412). For a consumer with weights W, inputs A and pre-activations z (without bias),

    s_c = max over images, outputs f and positions p of  (W_fc * A_c)(p) / sum_c' (W_fc' * A_c')(p),

with positive and negative weights, and positive and negative inputs, each for themselves, so that every term and
every sum is of one sign and the share lies in [0, 1].

The paper's share is that of the whole channel (`summed`); its released code takes the largest share of a single
weight of the window instead (`largest`). For windows of one position the two are one.

Ours beyond the paper: a channel of a group is all positions it stands for (a flattened map, say) and is as sensitive
as its most sensitive consumer; maps of more than `POSITIONS` positions are sampled; a transposed convolution is read
one tap at a time, which is exact where its windows do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from prune_env.pruning.activations import channels_last, evaluating, watching
from prune_env.pruning.consumer import draw, oriented, weights_of
from prune_env.pruning.graph import Group
from prune_env.pruning.surgery import CONVOLUTIONS, TRANSPOSED

CONSTANT = 3.0
"""C in the bounds, as in the released code."""
FAILURE = 1e-16
"""delta: the probability with which the bounds may fail, as in the released code."""
TINY = float(np.finfo(np.float32).eps)
"""A pre-activation this small has no shares (released code)."""
POSITIONS = 1024
"""Positions of a map that are looked at: all of a 32 x 32 map, a sample of a larger one."""
BATCH_SIZE = 32
ELEMENTS = 2**20
"""Numbers that are worked on at once: little enough for a core's cache."""
MIN_ROWS = 64

Shares = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(inputs `[unit, weight, row]`, weights `[unit, out, weight]`, 1 / z `[out, row]`) -> `[unit]` largest shares."""


def summed(
    inputs: Float[Tensor, "unit weight row"],
    weights: Float[Tensor, "unit out weight"],
    inverse: Float[Tensor, "out row"],
) -> Float[Tensor, " unit"]:
    """Largest share of a whole unit, its weights summed: the paper's sensitivity."""
    return torch.bmm(weights, inputs).mul_(inverse).amax((1, 2))


def largest(
    inputs: Float[Tensor, "unit weight row"],
    weights: Float[Tensor, "unit out weight"],
    inverse: Float[Tensor, "out row"],
) -> Float[Tensor, " unit"]:
    """Largest share of a single weight of a unit: the sensitivity of the released code."""
    best = inputs.new_zeros(inputs.shape[:2])
    for out, scale in enumerate(inverse):
        best = torch.maximum(best, (inputs * scale).amax(2) * weights[:, out])
    return best.amax(1)


def sample_size(network: nn.Module, example: Float[Tensor, "sample ..."]) -> int:
    """Images that the bounds ask for: ceil(C ln(8 eta* eta / delta)).

    eta is the number of pre-activations of the network for one input, eta* that of its largest layer.

    Args:
        network: Any network; it stays as it is.
        example: A few inputs to run once.
    """
    sizes: list[float] = []
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(network))
        for module in network.modules():
            if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
                hook = module.register_forward_hook(lambda _, args, output: sizes.append(output.numel() / len(example)))
                stack.callback(hook.remove)
        network(example)
    return math.ceil(CONSTANT * math.log(8 * max(sizes) * sum(sizes) / FAILURE))


def sensitivities(
    network: nn.Module,
    groups: Sequence[Group],
    images: Float[Tensor, "sample ..."],
    *,
    shares: Shares = summed,
    positions: int = POSITIONS,
) -> dict[str, Float[Tensor, " channel"]]:
    """The sensitivity of every channel of some groups, in [0, 1].

    Nothing is kept but the running maxima, so memory is that of one batch. The cost is that of the consumers' own
    multiply-accumulates, twice or (signed inputs) four times, for every image.

    Args:
        network: The dense network; mode, gradients and random state stay as they are.
        groups: Its groups.
        images: Normalised training images; see `sample_size`.
        shares: `summed` or `largest`.
        positions: Positions of a map that are looked at, drawn anew (seeded) for every few images.

    Returns:
        Group name -> `[channels]` float32 on the CPU. A channel that no watched module reads has 1: nothing is known.
    """
    found = {slot.module: Maxima(network, slot.module, groups) for group in groups for slot in group.consumers}
    # One generator for each, so that a consumer's samples do not depend on which others are watched.
    generators = {name: torch.Generator().manual_seed(0) for name in found}

    def observe(name: str, module: nn.Module, x: Tensor) -> None:
        for some in x.split(max(1, 4 * ELEMENTS // (x[0].numel() * found[name].taps))):
            for part in _one_sign(some.float()):
                found[name].update(_columns(module, part, limit=positions, generator=generators[name]), shares)

    with watching(network, found, observe), torch.no_grad():
        for batch in images.split(BATCH_SIZE):
            network(batch)
    scores = {}
    for group in groups:
        read = [found[slot.module].best[group.name] for slot in group.consumers if found[slot.module].seen]
        scores[group.name] = torch.stack(read).amax(0).cpu() if read else torch.ones(group.channels)
    return scores


class Maxima:
    """The running maxima of one consumer.

    Args:
        network: The dense network.
        name: The consumer's module name.
        groups: The groups whose channels it may read.

    Attributes:
        taps: Weights per output and input channel.
        best: Group name -> `[channels]`, the largest shares so far.
        seen: Whether the consumer has run.
    """

    def __init__(self, network: nn.Module, name: str, groups: Sequence[Group]) -> None:
        module = network.get_submodule(name)
        self.weights = _weights(module)
        self.taps = math.prod(weights_of(module).shape[2:])
        self.best: dict[str, Tensor] = {}
        self.seen = False
        self._blocks: list[tuple[str, Tensor, Tensor]] = []
        for group in groups:
            slots = [slot for slot in group.consumers if slot.module == name]
            if slots:
                index = np.concatenate([slot.index for slot in slots])
                unit = np.concatenate([slot.unit for slot in slots])
                self.best[group.name] = self.weights.new_zeros(group.channels)
                self._blocks += [(group.name, *block) for block in _blocks(index, unit)]

    def update(self, inputs: Float[Tensor, "column tap row"], shares: Shares) -> None:
        """Take some rows of inputs of one sign into account."""
        self.seen = True
        for sign in (1, -1):
            weights = (sign * self.weights).clamp_min_(0)
            for group, units, columns in self._blocks:
                rows = max(MIN_ROWS, ELEMENTS // (len(units) * len(weights)))
                outs = max(1, ELEMENTS // (len(units) * rows))
                found = self.best[group][units]
                for some in weights.split(outs):
                    own = some[:, columns].flatten(2).transpose(0, 1).contiguous()
                    for part in inputs.split(rows, dim=2):
                        total = some.flatten(1) @ part.flatten(0, 1)
                        inverse = torch.where(total > TINY, 1 / total, 0)
                        found = torch.maximum(found, shares(part[columns].flatten(1, 2), own, inverse))
                self.best[group][units] = found


def _blocks(index: np.ndarray, unit: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Units with equally many columns, `[n]`, and those columns, `[n, size]`."""
    columns = index[np.argsort(unit, kind="stable")]
    sizes = np.bincount(unit)
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes[sizes > 0]):
        same = np.flatnonzero(sizes == size)
        yield torch.from_numpy(same), torch.from_numpy(columns[starts[same][:, None] + np.arange(size)])


def _one_sign(x: Tensor) -> tuple[Tensor, ...]:
    """Inputs that are not negative: as they are, or their positive and their negative part."""
    return (x,) if bool((x >= 0).all()) else (x.clamp_min(0), (-x).clamp_min(0))


def _weights(module: nn.Module) -> Float[Tensor, "out column tap"]:
    """A consumer's weights as its inputs' columns are laid out."""
    weights = oriented(module).float()
    weights = weights.reshape(len(weights), weights.shape[1], -1)
    if isinstance(module, TRANSPOSED):
        return weights.transpose(1, 2).flatten(0, 1)[..., None]
    return weights


def _columns(
    module: nn.Module, x: Tensor, *, limit: int, generator: torch.Generator
) -> Float[Tensor, "column tap row"]:
    """What a consumer's weights are multiplied with; a row is a position of an image."""
    view, taps = _windows(module, x)
    shape = math.prod(view.shape[2 : 2 + taps]), math.prod(view.shape[2 + taps :])
    # Copied here, once, with the positions last: all that follows runs along memory.
    rows = view.movedim(0, 1 + taps).reshape(view.shape[1], shape[0], len(x), shape[1])
    chosen = draw(shape[1], limit, generator).to(x.device)
    return (rows if len(chosen) == shape[1] else rows[..., chosen]).flatten(2)


def _windows(module: nn.Module, x: Tensor) -> tuple[Float[Tensor, "sample column *tap_and_position"], int]:
    """A view of a consumer's inputs: taps, then positions; and the number of axes of taps."""
    if isinstance(module, nn.Linear):
        return channels_last(x, module).transpose(1, 2), 0
    if isinstance(module, TRANSPOSED):
        return x.flatten(2), 0
    assert isinstance(module, CONVOLUTIONS)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    axes = len(module.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    places = tuple(range(2, 2 + axes))
    return x.permute(0, 1, *(place + axes for place in places), *places), axes
