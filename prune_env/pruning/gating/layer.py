"""The gated layer: a convolution or linear layer whose output channels are scored, and switched, for every input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_env.pruning.surgery import BATCH_NORMS, CONVOLUTIONS


@dataclass(frozen=True, eq=False)
class Question:
    """What a gated layer knows when it asks which of its channels are active.

    Attributes:
        name: The layer's group.
        index: The layer's place in forward order.
        pooled: `[sample, input]` what the layer reads, averaged over positions.
        runtime: `[sample, channel]` runtime score of each output channel, without gradient.
        static: `[channel]` static score of each output channel, without gradient.
    """

    name: str
    index: int
    pooled: Float[Tensor, "sample input"]
    runtime: Float[Tensor, "sample channel"]
    static: Float[Tensor, " channel"]


Decide = Callable[[Question], Bool[Tensor, "sample channel"]]
"""Answers a question with the channels that are active."""

Producer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
"""A layer that a gate can belong to."""


class RectifiedLinear(nn.Linear):
    """A gate that is never negative: a linear layer and a rectifier (feature boosting and suppression)."""

    @classmethod
    def of(cls, linear: nn.Linear) -> RectifiedLinear:
        """A copy of a linear layer, rectified."""
        result = nn.utils.skip_init(cls, linear.in_features, linear.out_features, device=linear.weight.device)
        assert isinstance(result, cls)
        result.load_state_dict(linear.state_dict())
        return result.train(linear.training)

    def forward(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample channel"]:
        """`[sample, channel]` gates, never negative."""
        return super().forward(x).relu()


class FixedNorm(nn.BatchNorm1d):
    """A norm whose statistics are those of `calibrate`, in training as in evaluation.

    Running ones would follow the masks: a channel that is never active comes to have no variance, and its first value
    after that would count as hundreds of deviations.
    """

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample input"]:
        """`[sample, input]` standardised."""
        return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()

    def calibrate(self, x: Float[Tensor, "sample input"]) -> None:
        """Take each input's mean, and one variance for all: an input that hardly varies is not blown up."""
        self.running_mean.copy_(x.mean(0))
        self.running_var.fill_(float(x.var(0, correction=0).mean()))


class _Pool(torch.autograd.Function):
    """A layer's input, handed through, and its average over positions.

    One function, so that the average's gradient is added to the input's in one pass: autograd would first write it out
    for every position, a fifth of the time of a training step.
    """

    @staticmethod
    def forward(ctx, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.axes = axes
        return x.view_as(x), x.mean(axes, dtype=torch.float32)

    @staticmethod
    def backward(ctx, x: Tensor, pooled: Tensor) -> tuple[Tensor, None]:
        shape = [1 if axis in ctx.axes else size for axis, size in enumerate(x.shape)]
        positions = x[0].numel() // pooled.shape[1]
        return x + (pooled / positions).to(x.dtype).view(shape), None


class GatedLayer(nn.Module):
    """A producer, its BatchNorm without scale and shift, and the predictor that takes their place.

    The runtime predictor is the core paper's (section 3.1.1, and the forward pass of its official code): the global
    average of the layer's input goes through one linear layer, `g_r = W s + b`, and multiplies the normalised output.
    The scale of the BatchNorm becomes `b`, its shift is masked with the channel:

        out = norm(conv(x)) * g + shift * active,     g = sgn * g_r * g_s * active,
        sgn = -1 where g_r < 0 and g_s < 0, else +1

    so that two negative scores leave a negative gate, and the rectifier behind it closes what is positive in the
    channel. `W` starts at zero (the paper does not say): at first every gate is the BatchNorm's scale, bit for bit.

    Deviation: `s` is standardised with statistics of the dense network (`GatedNetwork.calibrate`), and divided by the
    root of its length. It is the same linear layer (`predictor` folds both in), but it learns: averages differ little
    between images (by .02 to .05 in a trained network whose scales are .1 to .3), so that the gradient of a plain `W`
    is all but that of `b`, and every image gets the same choice.

    Attributes:
        producer: The convolution or linear layer; it has a bias only in front of a norm.
        norm: BatchNorm without scale and shift, or nothing.
        sight: Standardises the pooled input.
        gain: One over the root of its length: a step of the optimiser then moves a score as far in any layer.
        gate: Linear from there to one score per output channel.
        shift: `[channel]` the BatchNorm's shift, or the producer's bias.
        added: Parameters per channel (beside the predictor's weights) that the ungated layer does not have.
    """

    def __init__(self, producer: Producer, norm: _BatchNorm | None) -> None:
        super().__init__()
        self.producer = copy.deepcopy(producer)
        weight = self.producer.weight
        channels, inputs = weight.shape[0], weight.shape[1]
        scale, shift, self.added = torch.ones(channels), torch.zeros(channels), 2
        if norm is None:
            self.norm: _BatchNorm | nn.Identity = nn.Identity()
            if self.producer.bias is not None:
                shift, self.added = self.producer.bias.detach().clone(), 1
                self.producer.register_parameter("bias", None)
        else:
            self.norm = _without_affine(norm)
            if norm.affine:
                scale, shift, self.added = norm.weight.detach().clone(), norm.bias.detach().clone(), 0
        self.sight, self.gain = FixedNorm(inputs, affine=False), inputs**-0.5
        # torch says only that it is a module.
        self.gate = cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, channels))
        with torch.no_grad():
            self.gate.weight.zero_()
            self.gate.bias.copy_(scale)
        self.shift = nn.Parameter(shift)
        self.to(weight.device)
        self._turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.shift.numel()

    def scores(self, x: Float[Tensor, "sample ..."]) -> tuple[Tensor, Tensor, Tensor]:
        """The input for the producer, its average `[sample, input]` and runtime scores `[sample, channel]`.

        Averages and scores are in float32 whatever runs around.
        """
        with torch.autocast(x.device.type, enabled=False):
            axes = self._positions(x)
            x, pooled = _Pool.apply(x, axes) if axes else (x, x.float())
            return x, pooled, self.gate(self.sight(pooled) * self.gain)

    def predictor(self) -> tuple[Float[Tensor, "channel input"], Float[Tensor, " channel"]]:
        """Weight and bias of the runtime predictor on the pooled input as it is, in evaluation mode."""
        with torch.no_grad():
            weight = self.gate.weight * (self.sight.running_var + self.sight.eps).rsqrt() * self.gain
            return weight, self.gate.bias - weight @ self.sight.running_mean

    def filter_sizes(self) -> Float[Tensor, " channel"]:
        """L2 norm of each filter over the layer's mean; one behind which a norm stands that undoes it."""
        size = self.producer.weight.detach().flatten(1).norm(dim=1)
        return size / size.mean().clamp_min(1e-12) if isinstance(self.norm, nn.Identity) else torch.ones_like(size)

    @torch.no_grad()
    def rescale(self, filters: Float[Tensor, " channel"], gates: Float[Tensor, " channel"]) -> None:
        """Multiply filters and runtime scores by positive factors of each channel."""
        self.producer.weight.mul_(filters.view(-1, *[1] * (self.producer.weight.dim() - 1)))
        self.gate.weight.mul_(gates[:, None])
        self.gate.bias.mul_(gates)

    def absorb_zeros(self, whole: GatedLayer, kept: Sequence[int] | None) -> None:
        """Give the bias what lost inputs, always zero, say to the predictor once they are standardised.

        Args:
            whole: The layer before some of its inputs, and perhaps outputs, were cut.
            kept: Its outputs that are left; None for all.
        """
        (weight, _), (_, bias) = self.predictor(), whole.predictor()
        with torch.no_grad():
            self.gate.bias.copy_((bias if kept is None else bias[list(kept)]) + weight @ self.sight.running_mean)

    def _positions(self, x: Float[Tensor, "sample ..."]) -> tuple[int, ...]:
        """Axes of the layer's input or output that are neither samples nor channels."""
        return tuple(range(1, x.dim() - 1) if isinstance(self.producer, nn.Linear) else range(2, x.dim()))

    def gated(
        self,
        x: Float[Tensor, "sample ..."],
        runtime: Float[Tensor, "sample channel"],
        static: Float[Tensor, " channel"],
        active: Bool[Tensor, "sample channel"],
    ) -> Float[Tensor, "sample ..."]:
        """The layer's output, zero where a channel is not active."""
        return self.opened(self.norm(self.producer(x)), runtime, static, active)

    def opened(
        self,
        y: Float[Tensor, "sample ..."],
        runtime: Float[Tensor, "sample channel"],
        static: Float[Tensor, " channel"],
        active: Bool[Tensor, "sample channel"],
    ) -> Float[Tensor, "sample ..."]:
        """What the gates make of the normalised output."""
        scale, shift = self.gates(runtime, static, active)
        axes = self._positions(y)
        shape = [1 if axis in axes else size for axis, size in enumerate(y.shape)]
        # In the number format of the map, so that autocast does not write it out in float32.
        return torch.addcmul(shift.to(y.dtype).view(shape), y, scale.to(y.dtype).view(shape))

    def gates(
        self,
        runtime: Float[Tensor, "sample channel"],
        static: Float[Tensor, " channel"],
        active: Bool[Tensor, "sample channel"],
    ) -> tuple[Float[Tensor, "sample channel"], Float[Tensor, "sample channel"]]:
        """Factor and shift of every channel for every input."""
        both = (runtime < 0) & (static < 0)
        gate = runtime * static
        return torch.where(both, -gate, gate) * active, self.shift * active

    def forward(self, x: Float[Tensor, "sample ..."]) -> Float[Tensor, "sample ..."]:
        """The layer's output under the decision of the network that is running it."""
        if self._turn is None:
            raise RuntimeError("a gated layer runs only inside its GatedNetwork")
        x, pooled, runtime = self.scores(x)
        static, active = self._turn(pooled, runtime)
        return self.gated(x, runtime, static, active)


def _without_affine(norm: _BatchNorm) -> _BatchNorm:
    """The same BatchNorm with its statistics and without scale and shift."""
    bare = type(norm)(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=False)
    bare.load_state_dict({name: value for name, value in norm.state_dict().items() if name not in ("weight", "bias")})
    return bare


def unfit(producer: nn.Module, carriers: tuple[nn.Module | None, ...]) -> str | None:
    """Why a layer cannot carry a gate, or None.

    Args:
        producer: The layer that writes the channels.
        carriers: What lies on the channels' way and keeps them apart: norms, depthwise convolutions; None for a bare
            parameter.
    """
    if not isinstance(producer, (*CONVOLUTIONS, nn.Linear)):
        return f"a {type(producer).__name__} writes it; a gate belongs to a convolution or linear layer"
    if getattr(producer, "groups", 1) != 1:
        return "a grouped convolution writes it"
    if len(carriers) > 1:
        return (
            "more than one layer lies between its producer and its consumers, and an inactive channel is not zero there"
        )
    if carriers and not (isinstance(carriers[0], BATCH_NORMS) and carriers[0].track_running_stats):
        kind = "bare parameter" if carriers[0] is None else type(carriers[0]).__name__
        return f"a {kind} lies on its way; only a BatchNorm with statistics gives way to a gate"
    return None
