"""Directional pruning: trained by gRDA, weights vanish along the flat directions of the loss.

Chao, Wang, Xing, Cheng, "Directional Pruning of Deep Neural Networks", NeurIPS 2020 (https://arxiv.org/abs/2006.09358);
constants as in the authors' code, https://github.com/donlan2710/gRDA-Optimizer (03935f1). The paper's text was not at
hand: what is said of the code was read there, and numbers of equations are left out.

Taken, in `baselines.grda` and `sparse`: the update on every parameter, with neither momentum nor decay; c and mu
(`PUBLISHED`); the learning rate, constant for half of the epochs, then falling in a straight line to 1 % at 90 %. The
authors start from random weights (a task made with `epochs=0`) and retrain nothing; a trained start works as well.

Scaling to a short training: what decides how many weights vanish is the threshold at its end, g_T, which is c times a
sum over the steps, so that is kept. With T steps at a rate gamma and a schedule of the same shape it means

    c' = c (T / T')^mu (gamma / gamma')^(1/2 + mu),

and `shortened`, the default, takes the sum itself, which is exact for any number of steps.

**Structured use: an extension of this project, in no part the paper's.** gRDA on whole channels (on BatchNorm scales or
on filters, `baselines.channel_grda`), plain SGD on the rest, from the trained network on. What dead channels still say
goes into the layers behind (`baselines.dead_channels`) with the last step of the training, so that the prepared network
computes the same without them. Then:

- importance: the rms that is left; a dead channel that speaks for others comes behind all living ones, the rest is 0;
- allocate: the channels above 0 in every group, its own ratios, if the budget has room for them, however much it has;
  else one threshold for all groups takes more, as `allocate.ranking` does;
- c: given, or such that g_T lies at the wanted quantile of the rms at the start (`closed_form`: exact if no dual moved,
  so a first guess), or found by `bisected` over trainings (`share_after`).

`DIRECTIONAL_UNSTRUCTURED` is the paper's training with whatever importance the user names: with l1 it is the mass that
is left. It is no structured method: zeros among the weights make no layer smaller.

Where the published part deviates:

- Batches are whole: the last, incomplete one of an epoch is left out. Labels are hard, images augmented as the task's
  own training does it, and the number format is that training's.
- The last epoch counts. The authors' ImageNet rows stop at different epochs, chosen on the validation set, and their
  shipped 30ep and 140ep scripts call a file whose schedule is commented out; neither is followed.

Reported by the authors' logs (last epoch, ten seeds, CIFAR-10): test accuracy in % at the % of all parameters that are
zero, SGD without momentum and decay beside it; nothing on channels. Ours, ResNet-20, twelve epochs from the trained
network, one seed (`python -m benchmarks.trained_papers`): 91.40 @ 35.2, SGD 91.82.

    | network       | SGD   | mu .4        | .501, .51    | .55          | .6           | .65          | .7            |
    |---------------|-------|--------------|--------------|--------------|--------------|--------------|---------------|
    | VGG-16 (.51)  | 90.82 | 90.87 @ 24.4 | 91.02 @ 61.4 |              | 90.86 @ 90.5 |              | 90.64 @ 97.2* |
    | WRN-28 (.501) | 94.17 | 94.25 @ 62.2 | 94.46 @ 90.2 | 94.43 @ 94.7 | 94.50 @ 97.1 | 94.53 @ 98.3 |               |

    * nine seeds; the tenth diverged. WRN at mu .4: four seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from baselines import allocate
from baselines.allocate import Choices, Counts
from baselines.channel_grda import TARGETS, GroupGRDA, bundles, closed_form, dead, norms
from baselines.dead_channels import fold, sending
from baselines.grda import GRDA, check_constants, strength
from baselines.method import Case, Method, Scores
from baselines.preparation import prepared_task
from prune_env.pruning.tracing import trace
from prune_env.tasks.dense import usual_training
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingState, TrainSettings
from prune_env.tasks.training.loop import Progress

VERSION = 1
"""Part of the cache's key: raise it when the same settings give another network."""
CIFAR_STEPS = 391
"""Steps of an epoch of the authors: 50,000 images in batches of 128, the incomplete one included."""
SHORT_EPOCHS = 10
"""Epochs of a training that is not the published one."""
SPEAKS = 1e-3
"""Score of a dead channel that speaks for others, as a share of the least living one's."""


@dataclass(frozen=True)
class Directional:
    """gRDA on all parameters; the defaults are the authors' for WRN-28-10.

    Raises:
        ValueError: A number that is not allowed; names it.
    """

    c: int | float = 1e-3
    """Size of the threshold."""
    mu: int | float = 0.55
    """Its growth with the steps; their WRN-28-10 has .501, .55, .6 and .65."""
    epochs: int = 200
    """Passes over the training split."""
    lr: int | float = 0.1
    """Learning rate of the first half."""
    batch_size: int | None = 128
    """Images per step; None takes those of the task's usual training."""

    def __post_init__(self) -> None:
        check_constants(c=self.c, mu=self.mu, lr=self.lr)


PUBLISHED = {
    "cifar10-vgg16": Directional(c=5e-4, mu=0.51, epochs=600),  # mu .4, .51, .6 and .7
    "cifar10-wrn-28-10": Directional(c=1e-3, mu=0.55, epochs=200),  # mu .501, .55, .6 and .65; CIFAR-100 as well
}
"""Task -> the authors' constants (their scripts)."""
PAPER = PUBLISHED["cifar10-wrn-28-10"]


@dataclass(frozen=True)
class Structured:
    """gRDA on whole channels: this project's extension.

    Raises:
        ValueError: A number that is not allowed, or an unknown target; names it.
    """

    target: str = "scales"
    """What is thresholded, a name of `TARGETS`."""
    share: int | float = 0.4
    """Share of all channels that `closed_form` aims at."""
    c: int | float | None = None
    """Size of the threshold in place of a share."""
    mu: int | float = 0.55
    """Its growth with the steps."""
    epochs: int = SHORT_EPOCHS
    """Passes over the training split."""
    lr: int | float = 0.05
    """Learning rate of the first half."""
    batch_size: int | None = None
    """Images per step; None takes those of the task's usual training."""

    def __post_init__(self) -> None:
        check_constants(mu=self.mu, lr=self.lr, **({} if self.c is None else {"c": self.c}))
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share!r}; a share of the channels from 0 below 1 is allowed")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; allowed are {', '.join(TARGETS)}")


def published_lr(lr: int | float, *, epoch: int, epochs: int) -> float:
    """The authors' learning rate in an epoch, counted from 1."""
    done = epoch / epochs
    if done <= 0.5:
        return float(lr)
    return lr * (1 - 0.99 * (done - 0.5) / 0.4) if done <= 0.9 else lr * 0.01


def rates(lr: int | float, *, epochs: int, steps: int) -> list[float]:
    """The learning rate of every step, with so many steps to an epoch."""
    return [rate for epoch in range(epochs) for rate in [published_lr(lr, epoch=epoch + 1, epochs=epochs)] * steps]


def shortened(settings: Directional, task: Task, *, epochs: int = SHORT_EPOCHS, lr: int | float = 0.1) -> Directional:
    """The published training made short for a task: c such that the threshold at its end is the same.

    Args:
        settings: The authors' constants, with `CIFAR_STEPS` steps to an epoch.
        task: Whose training split sets the steps of an epoch.
        epochs: Passes over it.
        lr: Learning rate of the first half.
    """
    steps = _steps(task, _training(task, epochs=epochs, lr=lr, batch_size=None, seed=0))
    there = strength(rates(settings.lr, epochs=settings.epochs, steps=CIFAR_STEPS), mu=settings.mu)
    here = strength(rates(lr, epochs=epochs, steps=steps), mu=settings.mu)
    return replace(settings, c=settings.c * there / here, epochs=epochs, lr=lr, batch_size=None)


def sparse(
    task: Task,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    settings: Directional | None = None,
    watch: Sequence[Hook] = (),
) -> Task:
    """The task with its network trained by gRDA on all parameters, as published; from the cache, or taken up again.

    Args:
        task: Its network is the start; the authors' is untrained.
        seed: Seed of order and augmentation.
        progress: Told about every step.
        settings: None takes the published ones, `shortened`.
        watch: Hooks that look at the training and change nothing.

    Raises:
        TrainingDiverged: The loss became NaN or Inf.
    """
    chosen = settings or shortened(PAPER, task)
    training = _training(task, epochs=chosen.epochs, lr=chosen.lr, batch_size=chosen.batch_size, seed=seed)
    return prepared_task(
        task,
        method="directional_sparse",
        constants={"version": VERSION, "c": chosen.c, "mu": chosen.mu},
        training=training,
        hooks=lambda network: [_schedule(training), *watch],
        optimizer=lambda network, _: GRDA(network.parameters(), lr=chosen.lr, c=chosen.c, mu=chosen.mu),
        progress=progress,
    )


def structured(
    task: Task, seed: int = 0, progress: Progress | None = None, *, settings: Structured | None = None
) -> Task:
    """The task with its network trained by gRDA on whole channels, dead ones silenced: this project's extension.

    Args:
        task: Its network is the start, a trained one.
        seed: Seed of order and augmentation.
        progress: Told about every step.
        settings: None takes the defaults.

    Raises:
        ValueError: A network in which nothing can be pruned.
        TrainingDiverged: The loss became NaN or Inf.
    """
    chosen = settings or Structured()
    graph = trace(task.network, task.example)
    channels = bundles(task.network, graph, task.example, target=chosen.target)
    training = _training(task, epochs=chosen.epochs, lr=chosen.lr, batch_size=chosen.batch_size, seed=seed)
    c = chosen.c
    if c is None:
        there = np.concatenate([*norms(task.network, channels).values()])
        steps = rates(chosen.lr, epochs=chosen.epochs, steps=_steps(task, training))
        c = closed_form(there, share=chosen.share, rates=steps, mu=chosen.mu)

    def silence(state: TrainingState) -> None:
        # Before the last checkpoint, so that the file in the cache holds the network that is pruned.
        if state.epoch == chosen.epochs - 1:
            fold(state.network, graph, dead(state.network, channels), task.example)

    return prepared_task(
        task,
        method="directional_structured",
        constants={"version": VERSION, "target": chosen.target, "c": c, "mu": chosen.mu},
        training=training,
        hooks=lambda network: [_schedule(training), Hook(after_epoch=silence)],
        optimizer=lambda network, _: GroupGRDA(network, channels, lr=chosen.lr, c=c, mu=chosen.mu),
        progress=progress,
    )


def _training(task: Task, *, epochs: int, lr: int | float, batch_size: int | None, seed: int) -> TrainSettings:
    """The task's usual training without decay and label smoothing; momentum is not read by gRDA."""
    usual = usual_training(task.data, task.network_name, seed=seed)
    size = usual.batch_size if batch_size is None else batch_size
    return replace(usual, epochs=epochs, lr=float(lr), batch_size=size, weight_decay=0.0, label_smoothing=0.0)


def _steps(task: Task, training: TrainSettings) -> int:
    """Steps of an epoch in the training loop."""
    return max(1, len(task.train) // training.batch_size)


def _schedule(training: TrainSettings) -> Hook:
    """The authors' learning rate in the place of the loop's one cycle."""

    def set_rate(state: TrainingState) -> None:
        state.lr = published_lr(training.lr, epoch=state.epoch + 1, epochs=training.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr

    return Hook(before_step=set_rate)


@dataclass(frozen=True)
class Sparsity:
    """Shares of parameters that are exactly zero, in [0, 1].

    Attributes:
        layers: Module name -> share of its own parameters, in forward order as far as they are registered so.
        whole: Share of all parameters.
    """

    layers: Mapping[str, float]
    whole: float


def sparsity(network: nn.Module) -> Sparsity:
    """How many parameters of a network are zero, biases and norms included, as the authors count them."""
    sizes, zeros = {}, {}
    for name, module in network.named_modules():
        own = [parameter.detach() for parameter in module.parameters(recurse=False)]
        if own:
            sizes[name] = sum(parameter.numel() for parameter in own)
            zeros[name] = sizes[name] - sum(int(parameter.count_nonzero()) for parameter in own)
    whole = sum(zeros.values()) / max(sum(sizes.values()), 1)
    return Sparsity({name: zeros[name] / size for name, size in sizes.items()}, whole)


def share_after(
    task: Task, *, settings: Structured, seed: int = 0, progress: Progress | None = None
) -> Callable[[float], float]:
    """For a c, the share of channels at zero after a structured training; each c is trained once and cached."""

    def share(c: float) -> float:
        prepared = structured(task, seed, progress, settings=replace(settings, c=c))
        graph = trace(task.network, task.example)
        gone = dead(prepared.network, bundles(task.network, graph, task.example, target=settings.target))
        return float(np.concatenate([*gone.values()]).mean())

    return share


def bisected(
    share_after: Callable[[float], float],
    *,
    share: int | float,
    low: float,
    high: float,
    tolerance: float = 0.02,
    rounds: int = 8,
) -> float:
    """The c after which the share is nearest to the wanted one, by bisection of log c.

    Args:
        share_after: c -> share of channels at zero; rising, if not strictly.
        share: Wanted.
        low: A c that leaves too few at zero, above 0.
        high: A c that leaves too many.
        tolerance: Difference of shares that is near enough.
        rounds: Trainings beside those of the two ends.

    Raises:
        ValueError: The wanted share is not between those of the ends.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low is {low!r} and high {high!r}; finite numbers above 0 that rise are allowed")
    found = {low: share_after(low), high: share_after(high)}
    if not found[low] <= share <= found[high]:
        raise ValueError(
            f"share is {share!r}; c from {low:g} to {high:g} reaches {found[low]:.3f} to {found[high]:.3f}"
        )
    for _ in range(rounds):
        if min(abs(reached - share) for reached in found.values()) <= tolerance:
            break
        middle = math.sqrt(low * high)
        found[middle] = share_after(middle)
        low, high = (middle, high) if found[middle] < share else (low, middle)
    return min(found, key=lambda c: abs(found[c] - share))


def left(case: Case, *, target: str) -> Scores:
    """What is left of each channel; a dead one that a layer still hears comes behind all living ones."""
    network, graph = case.problem.evaluator.network, case.problem.graph
    example = case.problem.evaluator.calibration[:1]
    channels = bundles(network, graph, example, target=target)
    scores = norms(network, channels)
    living = np.concatenate([score[score > 0] for score in scores.values()])
    last = SPEAKS * living.min() if len(living) else 1.0
    heard = sending(network, graph, dead(network, channels), example)
    return {name: np.where(heard[name], last, score) for name, score in scores.items()}


def own_ratios(case: Case) -> Counts:
    """The channels above zero, as far as they are allowed and the budget has room; else one threshold takes more."""
    choices, groups = case.choices, case.problem.graph.groups
    scores = [case.scores[groups[step].name] for step in case.problem.steps]
    levels = tuple(
        levels[: np.searchsorted(levels, np.count_nonzero(score)) + 1]
        for levels, score in zip(choices.levels, scores, strict=True)
    )
    return allocate.ranking(Choices(levels, choices.cost, choices.limit), scores)


def directional(name: str, settings: Structured) -> Method:
    """The structured extension as a method."""
    return Method(
        name,
        f"extension of Chao et al., NeurIPS 2020 (arXiv 2006.09358): gRDA on whole channels, {settings.target}",
        prepare=partial(structured, settings=settings),
        importance=partial(left, target=settings.target),
        allocate=own_ratios,
        epochs=lambda task: settings.epochs,
    )


DIRECTIONAL = directional("directional_pruning", Structured())
DIRECTIONAL_FILTERS = directional("directional_pruning_filters", Structured(target="filters"))
DIRECTIONAL_UNSTRUCTURED = Method(
    "directional_pruning_unstructured",
    "Chao et al., NeurIPS 2020 (arXiv 2006.09358): gRDA on all parameters; the user's importance ranks channels",
    prepare=sparse,
    epochs=lambda task: SHORT_EPOCHS,
)
