"""Hooks: where a method that changes training plugs into the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer


@dataclass
class TrainingState:
    """What a hook sees; the loop updates it from step to step.

    Attributes:
        network: The network in training; hooks may change its weights and gradients.
        optimizer: Its optimiser.
        steps: Steps of the whole training.
        step: Number of the current step, from 0.
        epoch: Number of the current epoch, from 0.
        lr: Learning rate of the current step.
        images: `[sample, ...]` what the network reads in the current step.
        labels: `[sample]` their classes.
        logits: `[sample, class]` what the network made of them, with gradients; from the forward pass on.
        loss: The loss of these logits, before any penalty; from the forward pass on.
    """

    network: nn.Module
    optimizer: Optimizer
    steps: int
    step: int = 0
    epoch: int = 0
    lr: float = 0.0
    images: Tensor = field(default_factory=partial(torch.empty, 0))
    labels: Tensor = field(default_factory=partial(torch.empty, 0))
    logits: Tensor = field(default_factory=partial(torch.empty, 0))
    loss: Tensor = field(default_factory=partial(torch.empty, 0))


def _nothing(state: TrainingState) -> None:
    """The default of every stage."""


@dataclass(frozen=True, eq=False)
class Hook:
    """Functions of the `TrainingState` that the loop calls; those not given do nothing.

    Attributes:
        before_step: Before the forward pass.
        penalty: A scalar that is added to the loss, e.g. a regulariser.
        after_backward: With gradients in place, before the optimiser's step.
        after_step: After the optimiser's step, e.g. a proximal step or a projection.
        after_epoch: After an epoch, before its checkpoint.
        tensors: The hook's own memory, changed in place only; checkpoints store and restore it.
    """

    before_step: Callable[[TrainingState], None] = _nothing
    penalty: Callable[[TrainingState], Tensor] | None = None
    after_backward: Callable[[TrainingState], None] = _nothing
    after_step: Callable[[TrainingState], None] = _nothing
    after_epoch: Callable[[TrainingState], None] = _nothing
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def adam(parameters: Mapping[str, nn.Parameter], *, share: float, betas: tuple[float, float] = (0.9, 0.999)) -> Hook:
    """A hook that trains some parameters by Adam in the place of the loop's SGD, without weight decay.

    Kingma and Ba, Adam (ICLR 2015), algorithm 1. Its steps follow the loop's cycle.

    Args:
        parameters: Name -> parameter of the network.
        share: Its learning rate as a share of the loop's.
        betas: Decay of the two moments.
    """
    first = {f"first.{name}": torch.zeros_like(parameter) for name, parameter in parameters.items()}
    second = {f"second.{name}": torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(state: TrainingState) -> None:
        count.add_(1)
        bias = [1 - beta ** int(count) for beta in betas]
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            mean, square = first[f"first.{name}"], second[f"second.{name}"]
            mean.lerp_(parameter.grad, 1 - betas[0])
            square.lerp_(parameter.grad.square(), 1 - betas[1])
            parameter.addcdiv_(mean, (square / bias[1]).sqrt_().add_(1e-8), value=-share * state.lr / bias[0])
            parameter.grad = None  # SGD passes over it

    return Hook(after_backward=step, tensors={**first, **second, "count": count})


def distillation(teacher: nn.Module, *, share: float | int, temperature: float | int = 1.0) -> Hook:
    """A hook that gives a teacher's answers a share in the loss.

    Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015), section 2: the loss becomes
    `(1 - share) loss + share T^2 CE(softmax(teacher / T), softmax(logits / T))`; `T^2` keeps the size of the gradients.

    Args:
        teacher: Answers in evaluation mode; it is copied.
        share: Weight of its answers, in [0, 1].
        temperature: T, above 0.

    Raises:
        ValueError: A share or a temperature that is not allowed.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share!r}; a number in [0, 1] is allowed")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; a number above 0 is allowed")
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False)

    def penalty(state: TrainingState) -> Tensor:
        # In the number format of the step: a teacher in float32 would cost more than the network in training.
        device, lower = state.images.device, state.logits.dtype == torch.bfloat16
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=lower):
            answers = (frozen.to(device)(state.images).float() / temperature).softmax(1)
        soft = functional.cross_entropy(state.logits.float() / temperature, answers)
        return share * (temperature**2 * soft - state.loss)

    return Hook(penalty=penalty)
