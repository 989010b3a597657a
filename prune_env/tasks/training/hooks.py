"""Hooks: where a method that changes training plugs into the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
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
    """

    network: nn.Module
    optimizer: Optimizer
    steps: int
    step: int = 0
    epoch: int = 0
    lr: float = 0.0


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
