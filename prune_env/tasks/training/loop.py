"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_env.number_format import autocast, format_named
from prune_env.tasks.images import Split
from prune_env.tasks.training.augmentation import augment
from prune_env.tasks.training.checkpoint import Checkpoint
from prune_env.tasks.training.hooks import Hook, TrainingState
from prune_env.tasks.training.memory import keep_freed_memory
from prune_env.tasks.training.settings import TrainSettings, one_cycle

Progress = Callable[[int, int, str], None]
"""Called as (steps done, steps in all, what is under way)."""


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or Inf; the network holds its state after the last good epoch."""


@dataclass(frozen=True)
class TrainReport:
    """What a training did, epoch by epoch.

    Attributes:
        losses: Mean training loss, penalties not counted.
        accuracies: Accuracy on the augmented training images while the weights still moved, in [0, 1].
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


def nesterov(network: nn.Module, settings: TrainSettings) -> Optimizer:
    """The usual optimiser: SGD with Nesterov momentum and decay of all parameters."""
    return torch.optim.SGD(
        network.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )


def train(
    network: nn.Module,
    split: Split,
    *,
    settings: TrainSettings,
    hooks: Sequence[Hook] = (),
    optimizer: Callable[[nn.Module, TrainSettings], Optimizer] = nesterov,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
) -> TrainReport:
    """Train a network in place, and leave it in eval mode on `device`.

    A checkpoint is written after every epoch and a training goes on from the one it finds, with the same result as
    if it had never stopped (same machine and number of threads). The global random state is left as it was.

    Args:
        network: What is trained; on other splits than images it reads flat rows.
        split: Training images.
        settings: What decides the outcome.
        hooks: Called in order at each stage.
        optimizer: Network and settings -> what takes the steps; the loop sets its learning rates. Its memory must be
            tensors of the parameters' shapes or scalars, for checkpoints hold it.
        progress: Told about every step.
        checkpoint: File to write after each epoch and to resume from.
        device: Where to train.

    Raises:
        ValueError: The checkpoint is corrupt or belongs to something else, or the split is empty.
        TrainingDiverged: The loss became NaN or Inf.
        OSError: The checkpoint cannot be written.
    """
    keep_freed_memory()
    network.to(device).to(memory_format=torch.channels_last)
    run = _Run(network, split, settings, tuple(hooks), optimizer(network, settings), progress, torch.device(device))
    if checkpoint is not None and checkpoint.exists():
        run.restore(Checkpoint.read(checkpoint, settings), checkpoint)
    try:
        return _trained(run, checkpoint)
    finally:
        # The layout decides the last bits of an output: a network and its saved and loaded twin shall agree.
        network.eval().to(memory_format=torch.contiguous_format)


def _trained(run: _Run, checkpoint: Path | None) -> TrainReport:
    """Run the epochs that are left.

    Raises:
        TrainingDiverged: The loss became NaN or Inf; the last good epoch is restored.
        OSError: The checkpoint cannot be written.
    """
    settings, good = run.settings, run.snapshot()
    cuda = [] if run.device.type == "cpu" else [run.device]
    with torch.random.fork_rng(devices=cuda), _threads(settings.threads):
        while good.epochs < settings.epochs:
            try:
                run.epoch()
            except TrainingDiverged:
                run.restore(good)
                raise
            good = run.snapshot()
            if checkpoint is not None:
                good.write(checkpoint, settings)
    return TrainReport(good.losses, good.accuracies)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """A training under way."""

    def __init__(
        self,
        network: nn.Module,
        split: Split,
        settings: TrainSettings,
        hooks: tuple[Hook, ...],
        optimizer: Optimizer,
        progress: Progress | None,
        device: torch.device,
    ) -> None:
        if not len(split):
            raise ValueError("the training split is empty")
        self.network, self.split, self.settings, self.hooks = network, split, settings, hooks
        self.progress, self.device, self.optimizer = progress, device, optimizer
        self.per_epoch = max(1, len(split) // settings.batch_size)
        self.state = TrainingState(network, self.optimizer, self.per_epoch * settings.epochs)
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def epoch(self) -> None:
        """One pass over the split, from a seed of its own."""
        self.network.train()
        self.state.epoch = len(self.losses)
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + self.state.epoch)
        torch.manual_seed(generator.initial_seed())
        order = torch.randperm(len(self.split), generator=generator)
        size = min(self.settings.batch_size, len(self.split))
        loss, correct = 0.0, 0
        for number, positions in enumerate(order[: self.per_epoch * size].split(size)):
            self.state.step = self.state.epoch * self.per_epoch + number
            step_loss, step_correct = self.step(positions, generator)
            loss, correct = loss + step_loss, correct + step_correct
            if self.progress is not None:
                text = f"epoch {self.state.epoch + 1}/{self.settings.epochs}, loss {loss / (number + 1):.3f}"
                self.progress(self.state.step + 1, self.state.steps, text)
        for hook in self.hooks:
            hook.after_epoch(self.state)
        if not all(parameter.isfinite().all() for parameter in self.network.parameters()):
            raise TrainingDiverged(self._diverged("weights hold NaN or Inf"))
        self.losses.append(loss / self.per_epoch)
        self.accuracies.append(correct / (self.per_epoch * size))

    def step(self, positions: Tensor, generator: torch.Generator) -> tuple[float, int]:
        """One step; its loss and the number of images that it got right."""
        state, settings = self.state, self.settings
        pixels = augment(self.split.pixels(positions), crop=settings.crop, flip=settings.flip, generator=generator)
        images = self.split.normalise(pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        labels = self.split.labels[positions].to(self.device)
        state.images, state.labels = images, labels
        state.lr = one_cycle(settings, step=state.step, steps=state.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = state.lr
        for hook in self.hooks:
            hook.before_step(state)
        self.optimizer.zero_grad()
        with autocast(self.device, format_named(settings.dtype, self.device)):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        state.logits, state.loss, value = logits, loss, loss.item()
        for hook in self.hooks:
            if hook.penalty is not None:
                loss = loss + hook.penalty(state)
        if not math.isfinite(loss.item()):
            raise TrainingDiverged(self._diverged(f"loss is {loss.item()}"))
        loss.backward()
        for hook in self.hooks:
            hook.after_backward(state)
        self.optimizer.step()
        for hook in self.hooks:
            hook.after_step(state)
        return value, int((logits.argmax(1) == labels).sum())

    def snapshot(self) -> Checkpoint:
        """A copy of everything that the next epoch depends on."""
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return Checkpoint(len(self.losses), tuple(self.losses), tuple(self.accuracies), tensors)

    def restore(self, saved: Checkpoint, source: Path | None = None) -> None:
        """Go back to a snapshot.

        Raises:
            ValueError: Its tensors are not those of this training.
        """
        parameters = dict(self.network.named_parameters())
        for name, tensor in saved.tensors.items():
            owner, _, key = name.removeprefix("optimizer.").rpartition("/")
            if name.startswith("optimizer.") and owner in parameters:
                device = parameters[owner].device if tensor.dim() else "cpu"
                self.optimizer.state[parameters[owner]].setdefault(key, torch.zeros_like(tensor, device=device))
        own = self._tensors()
        shapes = {name: tensor.shape for name, tensor in saved.tensors.items()}
        if saved.epochs and shapes != {name: tensor.shape for name, tensor in own.items()}:
            raise ValueError(f"checkpoint {source} belongs to another network or other hooks")
        with torch.no_grad():
            for name, tensor in saved.tensors.items():
                own[name].copy_(tensor)
        self.losses, self.accuracies = list(saved.losses), list(saved.accuracies)

    def _diverged(self, what: str) -> str:
        state = self.state
        return (
            f"{what} in epoch {state.epoch + 1}, step {state.step + 1}, at learning rate {state.lr:.3g}; "
            f"try a smaller lr than {self.settings.lr:g}"
        )

    def _tensors(self) -> Mapping[str, Tensor]:
        """Names -> tensors that a checkpoint holds; copying into them restores it."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            memory = self.optimizer.state.get(parameter, {}).items()
            tensors |= {f"optimizer.{name}/{key}": value for key, value in memory if isinstance(value, Tensor)}
        for number, hook in enumerate(self.hooks):
            tensors |= {f"hook{number}.{name}": tensor for name, tensor in hook.tensors.items()}
        return tensors
