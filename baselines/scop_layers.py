"""Layers of SCOP: selection layers while the scales are learned, scattered block ends while published cuts are counted.

With A what a layer writes for real images and A~ what it writes for control images, a selection layer hands on

    A_mix = beta (.) A + (1 - beta) (.) A~        beta in [0, 1], one number per channel

to whatever comes next, which is the norm. The scale of the control, beta~ = 1 - beta, is not a parameter of its own.
A~ itself is never mixed: it is the dense network's answer to the control images.

The authors send real and control images through as one batch and compute gradients for both halves. Nothing of the
control half can learn, so here it goes first, without gradients, and its features wait for the real ones: the same
numbers for norms in evaluation mode, without a quarter of the work, and in any layout of the feature maps.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines.method import Scores
from prune_env.pruning.consumer import norms_behind
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.surgery import CONVOLUTIONS, TRANSPOSED

Control = Callable[[Tensor], Tensor]
"""Real images -> as many control images, `[sample, ...]` both."""

BLOCK = ("conv1", "conv2", "conv3")
"""Convolutions inside a residual block, in order; the norm of each has the same number."""


class SelectionLayer(nn.Module):
    """Mixes a layer's real features with its control features.

    Attributes:
        beta: `[channel]` scale of the real features.
        axis: Where the channels run.
    """

    def __init__(self, channels: int, *, axis: int = 1, start: float = 0.5) -> None:
        super().__init__()
        self.axis = axis
        self.beta = nn.Parameter(torch.full((channels,), start))

    def forward(self, real: Float[Tensor, "*feature"], control: Float[Tensor, "*feature"]) -> Float[Tensor, "*feature"]:
        """Real features where beta is 1, control features where it is 0, to the bit in either case."""
        shape = [1] * real.dim()
        shape[self.axis] = -1
        return torch.lerp(control, real, self.beta.to(real.dtype).view(shape))

    @torch.no_grad()
    def project(self) -> None:
        """Move every scale to the nearest allowed one."""
        self.beta.clamp_(0, 1)


def permuted(images: Float[Tensor, "sample ..."]) -> Float[Tensor, "sample ..."]:
    """The same images in random order: what each meets is drawn without a look at its class.

    One draw of the global generator, which the training loop seeds for every epoch.
    """
    return images[torch.randperm(len(images)).to(images.device)]


class ControlledNetwork(nn.Module):
    """A frozen copy of a network that runs, in training mode, under the control of other images.

    In evaluation mode it is the dense network. The network inside, norms and dropout, is in evaluation mode always.

    Attributes:
        network: The copy; nothing of it learns.
        writers: Layers that have a selection layer, in forward order.
        selections: Their selection layers.
        control: Makes the control images; a module is frozen and stored with the rest.
    """

    def __init__(self, network: nn.Module, writers: Sequence[str], *, control: Control, start: float = 0.5) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.control = control
        if isinstance(control, nn.Module):
            self.control = copy.deepcopy(control).eval().requires_grad_(False)
        self.writers = tuple(writers)
        layers = [self.network.get_submodule(name) for name in self.writers]
        self.selections = nn.ModuleList(_selection(layer, start) for layer in layers)

    @property
    def layers(self) -> list[SelectionLayer]:
        """The selection layers as what they are; to torch a list has modules of any kind."""
        return cast("list[SelectionLayer]", list(self.selections))

    def train(self, mode: bool = True) -> ControlledNetwork:
        """Only whether real features are mixed changes."""
        self.training = mode
        return self

    def forward(self, images: Float[Tensor, "sample ..."]) -> Tensor:
        """Logits of the real images.

        Raises:
            ValueError: The network does not run the same layers on real and control images, which SCOP needs.
        """
        if not self.training:
            return self.network(images)
        waiting: list[deque[Tensor]] = [deque() for _ in self.writers]

        def remember(at: int, control: Tensor) -> None:
            # A rectifier in place would overwrite what waits.
            waiting[at].append(control.clone())

        def mix(at: int, real: Tensor) -> Tensor:
            if not waiting[at] or waiting[at][0].shape != real.shape:
                raise ValueError(_unlike(self.writers[at]))
            return self.selections[at](real, waiting[at].popleft())

        with torch.no_grad(), self._behind(remember):
            self.network(self.control(images))
        with self._behind(mix):
            logits = self.network(images)
        for name, left in zip(self.writers, waiting, strict=True):
            if left:
                raise ValueError(_unlike(name))
        return logits

    @contextmanager
    def _behind(self, act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Let something act on what each writer hands on."""
        with ExitStack() as stack:
            for at, name in enumerate(self.writers):

                def hook(module: nn.Module, args: tuple, output: Tensor, at: int = at) -> Tensor | None:
                    return act(at, output)

                stack.callback(self.network.get_submodule(name).register_forward_hook(hook).remove)
            yield


def _selection(writer: nn.Module, start: float) -> SelectionLayer:
    if isinstance(writer, nn.Linear):
        return SelectionLayer(writer.out_features, axis=-1, start=start)
    assert isinstance(writer, CONVOLUTIONS + TRANSPOSED)
    return SelectionLayer(writer.out_channels, start=start)


def _unlike(name: str) -> str:
    return (
        f"SCOP cannot control this network: it runs layer {name!r} otherwise for real than for control images, "
        "so that their features have no partner"
    )


def writers_of(graph: LayerGraph) -> tuple[str, ...]:
    """The layers that write a prunable group, in forward order."""
    written = {slot.module for group in graph.groups for slot in group.producers}
    return tuple(layer.name for layer in graph.layers if layer.name in written)


def norm_scales(network: nn.Module, writers: Sequence[str], example: Tensor) -> dict[str, Float[Tensor, " channel"]]:
    """|gamma| of the BatchNorm that reads each layer's output as it is, `[channel]`; layers without one are left out.

    Args:
        network: Any network.
        writers: Names of layers.
        example: An input with its batch axis, to run once.
    """
    found = norms_behind(network, writers, example)
    scales = {writer: network.get_submodule(norm).weight for writer, norm in found.items()}
    return {writer: scale.detach().abs() for writer, scale in scales.items() if isinstance(scale, Tensor)}


def signed_score(
    beta: Float[Tensor, " channel"], scale: Float[Tensor, " channel"] | None = None
) -> Float[Tensor, " channel"]:
    """I = |gamma| (beta - beta~) = |gamma| (2 beta - 1), and |gamma| = 1 where there is no norm.

    Args:
        beta: Scale of the real features.
        scale: |gamma|.
    """
    score = 2 * beta.detach() - 1
    return score if scale is None else scale * score


def group_scores(controlled: ControlledNetwork, graph: LayerGraph, example: Tensor) -> Scores:
    """Group name -> I of each channel, the sum over everything that writes it.

    Args:
        controlled: With learned scales.
        graph: Graph of the network inside.
        example: An input with its batch axis.
    """
    scales = norm_scales(controlled.network, controlled.writers, example)
    written = {
        name: signed_score(selection.beta, scales.get(name)).double().cpu().numpy()
        for name, selection in zip(controlled.writers, controlled.layers, strict=True)
    }
    found = {group.name: np.zeros(group.channels) for group in graph.groups}
    for group in graph.groups:
        for slot in group.producers:
            np.add.at(found[group.name], slot.unit, written[slot.module][slot.index])
    return found


class ScatteredNorm(nn.Module):
    """The norm at the end of a pruned residual block: its channels return to their places, the others are zero.

    Attributes:
        norm: Norm of the channels that are left.
        kept: `[kept]` their places.
        channels: Width of the stream.
    """

    kept: Tensor

    def __init__(self, norm: nn.Module, kept: Tensor, channels: int) -> None:
        super().__init__()
        self.norm, self.channels = norm, channels
        self.register_buffer("kept", kept)

    def forward(self, x: Float[Tensor, "sample kept *position"]) -> Float[Tensor, "sample channel *position"]:
        """As wide as the shortcut that it is added to."""
        x = self.norm(x)
        return x.new_zeros(len(x), self.channels, *x.shape[2:]).index_copy(1, self.kept, x)


def block_convolutions(network: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The convolutions of every residual block, in forward order; stem and shortcuts are in no block.

    Raises:
        ValueError: There is none that SCOP's published cut applies to.
    """
    found = []
    for prefix, module in network.named_modules():
        names = [name for name in BLOCK if isinstance(getattr(module, name, None), nn.Conv2d)]
        plain = all(getattr(module, name).groups == 1 for name in names)
        norms = all(isinstance(getattr(module, _norm(name), None), nn.BatchNorm2d) for name in names)
        if len(names) > 1 and plain and norms:
            found.append(tuple(f"{prefix}.{name}" if prefix else name for name in names))
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no residual block that the published cut is of: "
            f"plain convolutions {', '.join(BLOCK)}, each with a norm"
        )
    return tuple(found)


def _norm(name: str) -> str:
    return name.replace("conv", "bn")


def _convolution(network: nn.Module, name: str) -> nn.Conv2d:
    conv = network.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def sliced(network: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """The network as the authors cut it: all convolutions of residual blocks, stem and shortcuts whole.

    The outputs of a block's last convolution are put back to their places among zeros, so a block may lose others than
    the shortcut that it is added to. No plan can say that, hence a network of its own.

    Args:
        network: A residual network; it is left as it is.
        kept: Convolution inside a block -> kept outputs, rising; those not named stay whole.

    Raises:
        ValueError: The network has no such blocks, or a name is no convolution of one.
    """
    small = copy.deepcopy(network)
    blocks = block_convolutions(small)
    unknown = set(kept) - {name for block in blocks for name in block}
    if unknown:
        raise ValueError(f"kept names {min(unknown)!r}, which is no convolution of a residual block")
    for block in blocks:
        inputs = None
        for name in block:
            conv, place = _convolution(small, name), _norm(name)
            channels = conv.out_channels
            outputs = torch.tensor(list(kept.get(name, range(channels))), device=conv.weight.device)
            norm = small.get_submodule(place)
            assert isinstance(norm, nn.BatchNorm2d)
            _slice(conv, norm, inputs=inputs, outputs=outputs)
            if name == block[-1] and len(outputs) < channels:
                small.set_submodule(place, ScatteredNorm(norm, outputs, channels))
            inputs = outputs
    return small


@torch.no_grad()
def _slice(conv: nn.Conv2d, norm: nn.BatchNorm2d, *, inputs: Tensor | None, outputs: Tensor) -> None:
    """Keep some inputs and outputs of a convolution and the same outputs of its norm, in place."""
    weight = conv.weight[outputs]
    conv.weight = nn.Parameter(weight if inputs is None else weight[:, inputs])
    conv.out_channels, conv.in_channels = conv.weight.shape[:2]
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[outputs])
    norm.num_features = len(outputs)
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.dim():
            setattr(norm, name, nn.Parameter(tensor[outputs]) if name in ("weight", "bias") else tensor[outputs])


def kept_at_rate(channels: int, rate: float) -> int:
    """Channels that a convolution keeps at a pruning rate, as the authors round: C - int(rate C)."""
    return channels - int(rate * channels)


def published_cuts(network: nn.Module, example: Tensor, *, rate: float) -> dict[str, float]:
    """Share of macs and of params that the published cut takes away at one rate in all blocks.

    Args:
        network: A residual network.
        example: An input with its batch axis.
        rate: Share of the outputs that every convolution inside a block loses, in [0, 1).

    Raises:
        ValueError: A rate that is not allowed, or a network without such blocks.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate!r}; a share from 0 below 1 is allowed")
    widths = {name: _convolution(network, name).out_channels for block in block_convolutions(network) for name in block}
    small = sliced(network, {name: range(kept_at_rate(width, rate)) for name, width in widths.items()})
    return {
        "macs": 1 - count_macs(small, example) / count_macs(network, example),
        "params": 1 - count_params(small) / count_params(network),
    }
