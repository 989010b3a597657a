"""The gated convolution of channel gating: some inputs are always read, the others only where a gate opens.

Equations, the paper and what is deviated are in `baselines.channel_gating`. Here: which inputs are the base of which
outputs, the gate with its smoothed gradient, the convolution with its two norms, and the network that carries them.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from prune_env.pruning.graph import Layer, LayerGraph
from prune_env.pruning.measure import evaluating
from prune_env.pruning.surgery import BATCH_NORMS, CONVOLUTIONS

PROBE = 0.01
"""Size of what a norm is made to write, when it is tried whether a rectifier clips it: far from any ceiling."""

Writes = dict[str, tuple[float, int]]
"""Module -> size and seed of the noise that it is made to write."""


def shuffled(channels: int, parts: int) -> Int64[np.ndarray, " channel"]:
    """The channel that a shuffle moves to each place: the first of every part, then the second of every part.

    For parts of equal length that is the shuffle of ShuffleNet, a transposed `[part, place]`; here parts may differ by
    one. `numpy.argsort` of the result undoes it.
    """
    place = np.concatenate([np.arange(len(part)) for part in np.array_split(np.arange(channels), parts)])
    return np.argsort(place, kind="stable")


def _blocks(outputs: int, order: Int64[np.ndarray, " input"], parts: int) -> Bool[Tensor, "output input"]:
    """Output part i reads the i-th part of the inputs in some order."""
    base = torch.zeros(outputs, len(order), dtype=torch.bool)
    rows, columns = np.array_split(np.arange(outputs), parts), np.array_split(order, parts)
    for row, column in zip(rows, columns, strict=True):
        base[row[0] : row[-1] + 1, torch.from_numpy(column)] = True
    return base


def first(outputs: int, inputs: int, parts: int) -> Bool[Tensor, "output input"]:
    """All outputs have the first part of the inputs as their base."""
    return _blocks(outputs, np.arange(inputs), parts)[:1].repeat(outputs, 1)


def grouped(outputs: int, inputs: int, parts: int) -> Bool[Tensor, "output input"]:
    """Part i of the outputs has part i of the inputs as its base, so that no input is favoured."""
    return _blocks(outputs, np.arange(inputs), parts)


def mixed(outputs: int, inputs: int, parts: int) -> Bool[Tensor, "output input"]:
    """The same after a channel shuffle of the inputs: each base holds inputs from every part of the layer before.

    The shuffle is folded into the choice, for a convolution of shuffled inputs with shuffled weights is the same sum:
    nothing moves, and a trained network stays what it is.
    """
    return _blocks(outputs, shuffled(inputs, parts), parts)


BASES: dict[str, Callable[[int, int, int], Tensor]] = {"first": first, "grouped": grouped, "mixed": mixed}
"""(outputs, inputs, parts) -> `[output, input]`, true where an input is always read."""


class _SmoothStep(torch.autograd.Function):
    """1 above zero, else 0; its derivative is that of a sigmoid of slope alpha, `alpha s (1 - s)`."""

    @staticmethod
    def forward(ctx, pre: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(pre)
        ctx.slope = slope
        return torch.gt(pre, 0, out=torch.empty_like(pre))

    @staticmethod
    def backward(ctx, gates: Tensor) -> tuple[Tensor, None]:
        (pre,) = ctx.saved_tensors
        # Fused operators and no truth values, which have no fast path: passes over maps are what a gate's step costs.
        s = (ctx.slope * pre).sigmoid_()
        return torch.ops.aten.sigmoid_backward(gates, s).mul_(ctx.slope), None


class _SparseStep(_SmoothStep):
    """The same, without a gradient where the gate is closed: what was skipped need not be computed to learn."""

    @staticmethod
    def backward(ctx, gates: Tensor) -> tuple[Tensor, None]:
        gradient, _ = _SmoothStep.backward(ctx, gates)
        return torch.ops.aten.threshold_backward(gradient, ctx.saved_tensors[0], 0), None


STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {"smooth": _SmoothStep.apply, "sparse": _SparseStep.apply}
"""(normalised partial sum less its threshold, slope) -> gates, 0 or 1."""


@dataclass(frozen=True)
class Gating:
    """How a network is gated; the defaults are those of the authors' script.

    Attributes:
        parts: Parts G of the channels; one of them is always read.
        base: Which inputs that are, a name of `BASES`.
        start: Thresholds to begin with.
        slope: alpha of the smoothed gradient.
        step: The gradient, a name of `STEPS`.

    Raises:
        ValueError: A value that is not allowed; names the field.
    """

    parts: int = 4
    base: str = "grouped"
    start: float | int = 0.0
    slope: float | int = 2.0
    step: str = "sparse"

    def __post_init__(self) -> None:
        allowed = {
            "parts": (self.parts >= 2, "2 or more"),
            "base": (self.base in BASES, ", ".join(BASES)),
            "step": (self.step in STEPS, ", ".join(STEPS)),
            "start": (math.isfinite(self.start), "a finite number"),
            "slope": (0 < self.slope < math.inf, "a finite number above 0"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")


class Gate(nn.Module):
    """Opens where a normalised partial sum is above the threshold of its output channel.

    Args:
        channels: Output channels.
        gating: Slope and form of the gradient.

    Attributes:
        threshold: `[channel]` Delta, in standard deviations of the partial sum.
    """

    def __init__(self, channels: int, gating: Gating) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((channels,), -torch.inf))
        self.gating = gating

    def forward(self, z: Float[Tensor, "sample channel *position"]) -> Float[Tensor, "sample channel *position"]:
        """1 where the rest of the inputs is to be read, 0 elsewhere; in float32 whatever runs around."""
        return STEPS[self.gating.step](z.float() - _per_channel(self.threshold, z), self.gating.slope)


def _per_channel(values: Float[Tensor, " channel"], like: Tensor) -> Tensor:
    """A vector in a shape that meets the channels of a map."""
    return values.view(-1, *(1,) * (like.dim() - 2))


class GatedConvolution(nn.Module):
    """A convolution and its BatchNorm, of which only a part is computed where a gate stays closed.

        z = norm(Y_p),   d = 1[z > Delta],   out = d (BN_2(Y_p + Y_r)) + (1 - d) (gamma_1 z + beta_1)

    `BN_1(Y_p)` and the norm of the gate have the same statistics, so that they are one norm here. Both sums are
    computed in full, as in the authors' code: this layer is for training and for measuring, it is not faster.

    Args:
        convolution: An ungrouped convolution; it is copied.
        norm: The BatchNorm behind it, which becomes BN_2; it is copied. Scale and shift of BN_1 start as its own.
        gating: Parts, base and gradient.

    Attributes:
        convolution: W = [W_p, W_r].
        base: `[output, input]` true where an input is always read.
        base_norm: The norm of partial sums, without scale and shift.
        full_norm: BN_2.
        scale: `[channel]` gamma_1.
        shift: `[channel]` beta_1.
        gate: The thresholds; they start at minus infinity, where the layer is the dense one bit for bit.
    """

    base: Tensor

    def __init__(self, convolution: nn.Module, norm: nn.Module, gating: Gating) -> None:
        super().__init__()
        assert isinstance(convolution, CONVOLUTIONS)
        assert isinstance(norm, BATCH_NORMS)
        channels, weight = norm.num_features, convolution.weight
        self.convolution, self.full_norm = copy.deepcopy(convolution), copy.deepcopy(norm)
        self.base_norm = type(norm)(channels, eps=norm.eps, momentum=norm.momentum, affine=False)
        self.scale = nn.Parameter(norm.weight.detach().clone() if norm.affine else torch.ones(channels))
        self.shift = nn.Parameter(norm.bias.detach().clone() if norm.affine else torch.zeros(channels))
        self.gate = Gate(channels, gating)
        self.register_buffer("base", BASES[gating.base](len(weight), weight.shape[1], gating.parts))
        self.to(weight.device).train(convolution.training)

    def partial(self, x: Float[Tensor, "sample input *position"]) -> Float[Tensor, "sample channel *place"]:
        """Y_p: the sum over the base alone."""
        weight = self.convolution.weight
        masked = weight * self.base.view(*self.base.shape, *(1,) * (weight.dim() - 2))
        return functional_call(self.convolution, {"weight": masked}, (x,))

    def forward(self, x: Float[Tensor, "sample input *position"]) -> Float[Tensor, "sample channel *place"]:
        """The normalised output, before the rectifier."""
        full = self.full_norm(self.convolution(x))
        z = self.base_norm(self.partial(x))
        gates = self.gate(z).to(full.dtype)
        scale, shift = (_per_channel(values, z).to(z.dtype) for values in (self.scale, self.shift))
        # A weighted mean and no choice, so that the gates get a gradient; with gates of 0 and 1 it rounds nothing.
        return torch.lerp(torch.addcmul(shift, z, scale), full, gates)


class ChannelGatedNetwork(nn.Module):
    """A network some of whose convolutions are gated.

    Attributes:
        network: The network, with a `GatedConvolution` in the place of each gated convolution and its norm.
        graph: Graph of the dense network.
        names: Gated convolutions in forward order.
        refused: The other convolutions and linear layers, each with the reason.
    """

    def __init__(self, network: nn.Module, graph: LayerGraph, names: tuple[str, ...], refused: dict[str, str]) -> None:
        super().__init__()
        self.network, self.graph, self.names, self.refused = network, graph, names, refused

    @property
    def layers(self) -> list[GatedConvolution]:
        """The gated convolutions in forward order."""
        return [cast(GatedConvolution, self.network.get_submodule(name)) for name in self.names]  # torch: a Module

    @property
    def thresholds(self) -> list[nn.Parameter]:
        """`[channel]` of each gated convolution."""
        return [layer.gate.threshold for layer in self.layers]

    def forward(self, x: Float[Tensor, "sample ..."]) -> Tensor:
        """Inputs to outputs."""
        return self.network(x)

    @contextmanager
    def at(self, threshold: float) -> Iterator[ChannelGatedNetwork]:
        """The network with one threshold for all channels, say minus infinity; its own return on exit."""
        before = [own.detach().clone() for own in self.thresholds]
        with torch.no_grad():
            for own in self.thresholds:
                own.fill_(threshold)
        try:
            yield self
        finally:
            with torch.no_grad():
                for own, saved in zip(self.thresholds, before, strict=True):
                    own.copy_(saved)

    def calibrate(self, images: Float[Tensor, "sample ..."]) -> None:
        """Take the statistics of partial sums from some images, with every gate open; trained ones are overwritten."""

        def take(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            axes = (0, *range(2, args[0].dim()))
            norm.get_buffer("running_mean").copy_(args[0].mean(axes))
            norm.get_buffer("running_var").copy_(args[0].var(axes))

        handles = [layer.base_norm.register_forward_pre_hook(take) for layer in self.layers]
        try:
            with self.at(-torch.inf), evaluating(self):
                self(images)
        finally:
            for handle in handles:
                handle.remove()


def attach(network: nn.Module, graph: LayerGraph, example: Tensor, gating: Gating) -> ChannelGatedNetwork:
    """Gate every convolution that can be gated: not the first, ungrouped, with a BatchNorm and a rectifier behind it.

    Norm and rectifier are found by running the network: the norm alone reads the very tensor that the convolution
    writes, and what it writes below zero is lost. Open everywhere, a gate must leave the network's output as it is.

    Args:
        network: The dense network; it is copied.
        graph: Its graph.
        example: One normalised input with its batch axis.
        gating: How.

    Raises:
        ValueError: No layer can be gated (says why), or the network's code depends on what stands in its places.
    """
    dense, private = (copy.deepcopy(network).eval() for _ in range(2))
    noise = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example.device)
    sample = noise if example.is_floating_point() else example
    first_convolution = next((layer.name for layer in graph.layers if layer.kind == "conv"), None)
    refused: dict[str, str] = {}
    with torch.no_grad():
        norms, calls = _norms_behind(dense, sample)
        for layer in graph.layers:
            places = layer.name, norms.get(layer.name, "")
            module, norm = map(dense.get_submodule, places)
            reason = "the first convolution stays whole" if layer.name == first_convolution else None
            reason = reason or _unfit(layer, module, norm, gating.parts, max(calls[place] for place in places))
            reason = reason or _misplaced(dense, *places, sample)
            if reason is None:
                private.set_submodule(layer.name, GatedConvolution(module, norm, gating))
                private.set_submodule(places[1], nn.Identity())
            else:
                refused[layer.name] = reason
        accepted = tuple(layer.name for layer in graph.layers if layer.name not in refused)
        if not accepted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
            raise ValueError(f"the network has no convolution that channel gating supports ({reasons})")
        if not _agree(_outputs(dense, sample, {}), _outputs(private, sample, {})):
            raise ValueError("the network computes something else with gates, although every gate is open")
        result = ChannelGatedNetwork(private, graph, accepted, refused).train(network.training)
        for threshold in result.thresholds:
            threshold.fill_(gating.start)
    return result


def _norms_behind(network: nn.Module, sample: Tensor) -> tuple[dict[str, str], Counter[str]]:
    """Layer -> the BatchNorm that reads what it writes, unchanged; and how often each module runs."""
    found: dict[str, str] = {}
    calls: Counter[str] = Counter()
    written: list[tuple[Tensor, int, str]] = []  # held, lest a later tensor take the place of an earlier one

    def wrote(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            calls[name] += 1
            if isinstance(output, Tensor):
                written.append((output, output._version, name))

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            found.update({by: name for x, version, by in written if x is args[0] and x._version == version})

        return hook

    modules = list(network.named_modules())
    handles = [module.register_forward_hook(wrote(name)) for name, module in modules]
    handles += [m.register_forward_pre_hook(read(name)) for name, m in modules if isinstance(m, BATCH_NORMS)]
    try:
        network(sample)
    finally:
        for handle in handles:
            handle.remove()
    return found, calls


def _unfit(layer: Layer, module: nn.Module, norm: nn.Module, parts: int, calls: int) -> str | None:
    """Why a layer cannot be gated as far as it and its norm show, or None."""
    if not (isinstance(module, CONVOLUTIONS) and isinstance(module.weight, nn.Parameter)):
        return f"a {type(module).__name__} is no ordinary convolution"
    if layer.groups != 1:
        return "a grouped convolution has too few inputs per output to split"
    if min(layer.in_channels, layer.out_channels) < parts:
        return f"{layer.in_channels} inputs and {layer.out_channels} outputs are too few for {parts} parts"
    if not (isinstance(norm, BATCH_NORMS) and norm.track_running_stats):
        return "no BatchNorm with statistics reads its output directly"
    return "it or its norm runs more than once for an input" if calls != 1 else None


def _misplaced(network: nn.Module, name: str, norm: str, sample: Tensor) -> str | None:
    """Why a convolution cannot be gated as far as what happens around it shows, or None."""

    def alike(one: Writes, other: Writes) -> bool:
        return _agree(_outputs(network, sample, one), _outputs(network, sample, other))

    if not alike({norm: (-PROBE, 0)}, {norm: (-PROBE, 1)}) or alike({norm: (PROBE, 0)}, {norm: (PROBE, 1)}):
        return "no rectifier stands directly behind its norm: what is negative there still counts"
    if not alike({norm: (PROBE, 0), name: (PROBE, 1)}, {norm: (PROBE, 0), name: (PROBE, 2)}):
        return "something else than its norm reads its output, too"
    return None


def _outputs(network: nn.Module, sample: Tensor, writes: Writes) -> list[Any]:
    """What a network returns when some of its modules write positive (or negative) noise."""

    def writing(size: float, seed: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return (size * (0.5 + torch.rand(output.shape, generator=torch.Generator().manual_seed(seed)))).to(output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(writing(*how)) for name, how in writes.items()]
    try:
        return tree_leaves(network(sample))
    finally:
        for handle in handles:
            handle.remove()


def _agree(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, Tensor))
