"""Training gated networks, through the one training loop: predictors, static scores and the network together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prune_env.pruning.gating.layer import Decide
from prune_env.pruning.gating.network import GatedNetwork, attach
from prune_env.pruning.tracing import trace
from prune_env.tasks.dense import usual_training
from prune_env.tasks.prepared import train_once
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingState, TrainSettings, train
from prune_env.tasks.training.hooks import adam
from prune_env.tasks.training.loop import Progress, TrainReport

GATE_EPOCHS = {"digits": 4}
"""Epochs that predictors are trained for by default; one for data sets that are not named."""

LEARNING_RATE = 0.05
"""Peak of the one cycle of SGD that trains the network. (The core paper: Adam at 1e-3 for everything.)"""

GATES_RATE = 1e-3
"""Peak learning rate of Adam for predictors and static scores, as in the core paper."""

REFRESH = 50
"""Steps between two refreshes of the static predictor's features. The official code computes them once."""

VERSION = 6
"""Part of the cache's key: raise it when the same settings give another network."""


CALIBRATION = 512
"""Training images from which the predictors' inputs are standardised."""


def attached(task: Task, *, static: str = "vector") -> GatedNetwork:
    """The task's network with a gate at every group that can carry one, ready to be trained.

    Args:
        task: Whose dense network; it is left as it is.
        static: Form of the static importance.

    Raises:
        ValueError: An unknown static importance, or a network without a layer that can carry a gate.
    """
    gated = attach(task.network, trace(task.network, task.example), task.example, static=static)
    gated.calibrate(task.calibration(CALIBRATION)[0])
    return gated


@contextmanager
def deciding(gated: GatedNetwork, decide: Decide | None) -> Iterator[GatedNetwork]:
    """The network under some decisions; its own return on exit."""
    before, gated.decide = gated.decide, decide
    try:
        yield gated
    finally:
        gated.decide = before


def gate_settings(task: Task, *, epochs: int, lr: float = LEARNING_RATE, seed: int = 0) -> TrainSettings:
    """The dense training's recipe, shorter and with a lower peak."""
    return usual_training(task.data, task.network_name, seed=seed, epochs=epochs, lr=lr)


def gates_hook(gated: GatedNetwork, settings: TrainSettings) -> Hook:
    """Predictors and, where they learn, static scores are trained by Adam."""
    gates = ((at, layer.gate.named_parameters()) for at, layer in enumerate(gated.layers))
    parameters = {f"{at}.{name}": parameter for at, named in gates for name, parameter in named}
    parameters |= {f"static.{name}": p for name, p in gated.static.named_parameters() if p.requires_grad}
    return adam(parameters, share=GATES_RATE / settings.lr)


def train_gated(
    gated: GatedNetwork,
    task: Task,
    settings: TrainSettings,
    *,
    static: bool = True,
    decide: Decide | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
) -> TrainReport:
    """Train network, runtime predictors and, if released, static scores by cross-entropy.

    Args:
        gated: Trained in place; in eval mode afterwards.
        task: Its training split.
        settings: Epochs, learning rate and so on.
        static: Whether the static scores learn; the core paper releases them in its third stage.
        decide: Decisions that hold during the training; None keeps every channel active.
        progress: Told about every step.
        checkpoint: File to write after each epoch, and to go on from.
        device: Where to train.

    Raises:
        TrainingDiverged: The loss became NaN or Inf; the last good state is kept.
    """

    def refresh(state: TrainingState) -> None:
        if state.step % REFRESH == 0:
            gated.refresh()

    gated.to(device).static.requires_grad_(static)
    hooks = (gates_hook(gated, settings), *((Hook(after_backward=refresh),) if static else ()))
    try:
        with deciding(gated, decide):
            return train(
                gated,
                task.train,
                settings=settings,
                hooks=hooks,
                progress=progress,
                checkpoint=checkpoint,
                device=device,
            )
    finally:
        gated.static.requires_grad_(True)


def prepared(
    task: Task,
    *,
    static: str = "vector",
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    root: Path | str | None = None,
) -> GatedNetwork:
    """The task's network with trained gates, from the cache or by training them with every channel active.

    Runtime and static scores share the scales of channels from the beginning, so that both rank.

    Args:
        task: Whose dense network; it is left as it is.
        static: Form of the static importance.
        epochs: Passes over the training split; None takes the data set's own, 0 leaves the gates as attached.
        seed: Seed of order and augmentation.
        progress: Told about every step.
        root: Data root, under which the cache is.

    Raises:
        ValueError: A network without a layer that can carry a gate, or a corrupt file in the cache.
        TrainingDiverged: The loss became NaN or Inf.
    """
    gated = attached(task, static=static)
    epochs = GATE_EPOCHS.get(task.data, 1) if epochs is None else epochs
    if epochs == 0:
        return gated.eval()
    gated.share_scales()
    settings = gate_settings(task, epochs=epochs, seed=seed)
    train_once(
        gated,
        task,
        kind="gates",
        content={"version": VERSION, "static": static, **dataclasses.asdict(settings)},
        run=lambda checkpoint: train_gated(gated, task, settings, progress=progress, checkpoint=checkpoint),
        root=root,
    )
    return gated.eval()
