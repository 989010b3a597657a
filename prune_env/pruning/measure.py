"""Measurement: macs, params, latency, accuracy; the budget they are held to; the meter bound to one split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prune_env.number_format import autocast
from prune_env.pruning.fusion import fused

RESOURCES = ("macs", "params", "latency_s")

FUSING_PAYS = 1 << 19
"""Pixels of a split from which on it is worth it to fuse each network first, which takes some ten milliseconds."""

BATCH_SIZE = 125
"""Images per forward pass of a meter: larger batches push the feature maps of small networks out of a core's cache."""


@dataclass(frozen=True)
class Measurement:
    """What a network achieves on one split and what it costs.

    Attributes:
        accuracy: Share of images classified rightly, in [0, 1].
        loss: Mean cross-entropy, nats per image.
        macs: Multiply-accumulates for one input.
        params: Parameters.
        latency_s: Median seconds of a forward pass, where it was measured. Never part of equality: a clock's
            reading does not make two networks different.
        steps: Optimiser steps that the measurement took; 0 where nothing was trained.
        rungs: Accuracy at each place where the training could have been stopped, its end included.
    """

    accuracy: float
    loss: float
    macs: int
    params: int
    latency_s: float | None = field(default=None, compare=False)
    steps: int = 0
    rungs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Budget:
    """How much of one resource the pruned network may cost.

    Attributes:
        resource: One of `RESOURCES`.
        limit: The most it may cost, in the resource's own unit.
        fraction: The same as a share of the dense network's value.
    """

    resource: str
    limit: float
    fraction: float

    @classmethod
    def of(cls, value: int | float, *, resource: str, dense: int | float, minimum: int | float) -> Budget:
        """Read a budget as people write it.

        Args:
            value: A share of the dense value in (0, 1], or a whole number above 1: the amount itself.
            resource: What is limited.
            dense: The dense network's value.
            minimum: The least that pruning can reach.

        Raises:
            ValueError: An unknown resource, or a value that is neither of the two, or that no plan can meet
                (the message says what is reachable), or above the dense value.
        """
        if resource not in RESOURCES:
            raise ValueError(f"budget_resource is {resource!r}; allowed are {', '.join(RESOURCES)}")
        limit = _limit(value, resource, dense)
        if limit > dense:
            raise ValueError(f"budget is {value} {resource}; the dense network costs only {_amount(dense)}")
        if limit < minimum:
            # Rounded up, so that the share in the message is one that works.
            share = min(1.0, math.ceil(minimum / dense * 1e4) / 1e4)
            raise ValueError(
                f"budget {value} cannot be reached: with every group at its minimum the network still costs "
                f"{_amount(minimum)} of {_amount(dense)} {resource}, so {share:g} is the smallest share allowed"
            )
        return cls(resource, limit, limit / dense)


def _limit(value: Any, resource: str, dense: int | float) -> float:
    """The budget in the resource's own unit."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 < value <= 1:
        return float(value * dense)
    if number and value > 1 and math.isfinite(value) and float(value).is_integer() and resource != "latency_s":
        return float(value)
    absolute = "" if resource == "latency_s" else f", or a whole number of {resource} above 1"
    raise ValueError(f"budget is {value!r}; allowed is a share of the dense network's {resource} in (0, 1]{absolute}")


def _amount(value: int | float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode and without gradients; every module's own mode returns on exit."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        for module in training:
            module.training = True


def count_macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates for one input, counted by torch: half of what `FlopCounterMode` counts.

    Convolutions, linear layers and matrix products (attention) count; biases, norms, activations and pooling do
    not. The network, its mode and the global random state stay as they are.

    Args:
        network: Any network.
        example: `[n, ...]` one batch of inputs.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    # Fused attention is one operator that the counter cannot see into; which kernels exist depends on the processor.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            evaluating(network),
            torch.random.fork_rng(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            network(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // (2 * len(example))


def count_params(network: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, with everything it depends on.

    Attributes:
        median_s: Median seconds for the whole batch.
        iqr_s: Interquartile range, seconds.
        threads: CPU threads.
        batch: Inputs per pass.
        dtype: Number format of the input, such as `float32`.
        device: Where it ran.
    """

    median_s: float
    iqr_s: float
    threads: int
    batch: int
    dtype: str
    device: str


def measure_latency(
    network: nn.Module,
    example: Tensor,
    *,
    threads: int = 1,
    min_run_time: int | float = 0.5,
    clock: Callable[[], float] | None = None,
) -> Latency:
    """Time the forward pass of a channels_last copy of the network in evaluation mode.

    The network runs in the number format of `example`, on its device.

    Args:
        network: Any network.
        example: `[n, ...]` one batch of inputs.
        threads: CPU threads to use; the process's own setting returns afterwards.
        min_run_time: Seconds to go on measuring, at least.
        clock: Seconds so far; None is the wall's. A process's own clock leaves out what others take from its core,
            and counts all of its threads.

    Raises:
        ValueError: `threads` or `min_run_time` is not positive.
    """
    if threads < 1 or not min_run_time > 0:
        raise ValueError(f"threads and min_run_time must be positive, not {threads} and {min_run_time}")
    # Imported here: it brings in torch's compiler for extensions, slow and talkative where CUDA is half installed.
    from torch.utils.benchmark import Timer

    copy = deepcopy(network).eval().to(device=example.device, dtype=example.dtype)
    copy = copy.to(memory_format=torch.channels_last)
    images = _laid_out(example)
    own: dict[str, Any] = {} if clock is None else {"timer": clock}
    timer = Timer("network(images)", globals={"network": copy, "images": images}, num_threads=threads, **own)
    with torch.inference_mode():
        taken = timer.blocked_autorange(min_run_time=min_run_time)
    dtype = str(example.dtype).removeprefix("torch.")
    return Latency(taken.median, taken.iqr, threads, len(example), dtype, str(example.device))


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images.contiguous()


def prepare_images(images: Tensor, *, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """Images as evaluation wants them: on the device, in the autocast number format, channels_last."""
    return _laid_out(images.to(device=device, dtype=dtype))


class Meter:
    """Accuracy and loss on one split, whose images are prepared once.

    Args:
        images: `[n, ...]` normalised images (or feature vectors).
        labels: `[n]` class indices.
        batch_size: Images per forward pass.
        dtype: Number format of the forward pass; bfloat16 runs under autocast.
        device: Where to evaluate; the network must be there.

    Raises:
        ValueError: No images, or not one label each.
    """

    def __init__(
        self,
        images: Float[Tensor, "image ..."],
        labels: Int64[Tensor, " label"],
        *,
        batch_size: int = BATCH_SIZE,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(f"a meter needs one label for each image, not {len(images)} images, {len(labels)} labels")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least 1 is allowed")
        self.device = torch.device(device)
        self.dtype = dtype
        batches = prepare_images(images, device=self.device, dtype=dtype).split(batch_size)
        self._batches = list(zip(batches, labels.to(self.device).split(batch_size), strict=True))
        self._images = len(images)
        self._fusing = images.ndim == 4 and len(images) * images.shape[-2] * images.shape[-1] >= FUSING_PAYS

    def __len__(self) -> int:
        return self._images

    def accuracy_and_loss(self, network: nn.Module) -> tuple[float, float]:
        """Share of images classified rightly, and mean cross-entropy in nats, of the network in evaluation mode."""
        # Sums stay on the device: nothing waits for a batch before the next one starts.
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        with evaluating(network), torch.inference_mode(), autocast(self.device, self.dtype):
            forward = fused(network, self._batches[0][0], self.dtype) if self._fusing else network
            for images, labels in self._batches:
                logits = forward(images).float()
                right += (logits.argmax(dim=1) == labels).sum()
                loss += functional.cross_entropy(logits, labels, reduction="sum")
        return float(right) / self._images, float(loss) / self._images
