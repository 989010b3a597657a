"""Channel gating: a part of the inputs decides, output by output, whether the others are worth reading.

Hua, Zhou, De Sa, Zhang, Suh, "Channel Gating Neural Networks", NeurIPS 2019 (https://arxiv.org/abs/1805.12549);
constants from the authors' code, https://github.com/cornell-zhang/dnn-gating. The inputs of a layer are split into a
base p, one of G parts, and the rest r; for every image, output channel c and position:

    Y_p = W_p * x_p,   Y_r = W_r * x_r,   z = norm(Y_p)              norm: BatchNorm without scale and shift
    d   = 1[z > Delta_c],   dd/dz := alpha s (1 - s),  s = sigmoid(alpha (z - Delta_c));  `sparse`: 0 where d = 0
    out = relu(d BN_2(Y_p + Y_r) + (1 - d) BN_1(Y_p))                the two norms: figure 4
    L   = cross-entropy + lambda sum over layers and channels of (T - Delta_c)^2

    macs of a layer = outputs k^2 c_in (eta + (1 - eta) a),  eta = 1/G,  a the share of outputs whose gate is open

One target T serves all layers, for z has no mean and unit variance in each channel: were it Gaussian, a = 1 - Phi(T).
Groups: output part i has input part i as its base, so that every input is some output's; a shuffle mixes the parts.
The paper's text was not at hand: the equations are those of the code, without numbers. Figure 4, the two norms, is
known from an issue of the authors' repository; how the norms meet is our reading.

Where we deviate:

- Training starts from a dense network, whose BatchNorm becomes BN_2 and lends BN_1 its scale and shift; statistics of
  Y_p are measured on training images. With thresholds at minus infinity the network is the dense one. The authors
  train from scratch: here that is a task of zero epochs.
- Two norms as in the paper; the released code has one, behind the merge. So the gate's gradient is that of
  BN_2(Y) - BN_1(Y_p), where the code has Y_r. BN_1 and the norm of the gate share their statistics, of all positions.
- The shuffle is folded into which inputs form a base (`mixed`): the same sums, and nothing moves.
- Parts may differ by one channel; the code drops the remainder from the base.
- Gated are convolutions with a BatchNorm and a rectifier directly behind them, in any traced network, never the first:
  in a residual block that is the first of two, as in the paper. `post_activated` makes it both, as in the code's
  second script, but the block then computes something else and must be trained.
- One-cycle SGD in place of steps of .1; no gate per channel (tau_c, equation 4), no second threshold for saturating
  activations, no count of memory accesses.
- Distillation is from the dense network itself, at any share; the authors' is from a larger one, on ImageNet.
- `scaled`, for trainings of a few epochs: lambda such that the penalty alone takes a threshold nearly to T (`TRAVEL`).

Is it faster? Not here. The gates are fine-grained, and what computes channels as a whole can only skip one for an image
in which no position opens (`closed` of a measurement). In ResNet-20 on CIFAR-10 that is so of 0 to 4 % of a layer's
channels at T = 1, and of 6 to 36 % at T = 2, where the bases are nearly all that is left to compute. What is counted is
what an accelerator would save that skips single outputs; norm, comparison and merging are not, as by the authors.

Reported, as quoted by others (ManiDP, table 1): ResNet-18 on ImageNet 31.7 % error at 50.7 % fewer FLOPs, ResNet-34
28.7 % at 50.4 %. Ours, ResNet-20 on CIFAR-10, 12 epochs, one seed (`python -m benchmarks.trained_papers`):
91.7 -> 89.52 % at .699 of the macs with T = 1, 88.37 % at .661 with T = 2.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.channel_gating_layers import ChannelGatedNetwork, Gating, attach
from baselines.channel_gating_measurement import BATCH, GatingCost, GatingMeasurement, measure_gating, open_share
from baselines.method import Case, Method, Scores
from baselines.preparation import root_of
from prune_env.gates import gate_settings
from prune_env.number_format import format_named
from prune_env.pruning.measure import Budget
from prune_env.pruning.tracing import trace
from prune_env.tasks.images import Split
from prune_env.tasks.prepared import train_once
from prune_env.tasks.resnet import ResidualBlock
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainSettings, train
from prune_env.tasks.training.hooks import distillation
from prune_env.tasks.training.loop import Progress
from prune_env.tasks.training.settings import one_cycle

VERSION = 1
"""Part of the cache's key: raise it when the same settings give another network."""

EPOCHS = {"digits": 12}
"""Epochs of a scaled training; two for data sets that are not named."""

TRAVEL = 3.0
"""Time constants of a scaled training: the penalty alone takes thresholds 95 % of the way to the target, or further."""

CALIBRATION = 512
"""Training images on which the statistics of partial sums, and the macs of a target, are measured."""

LOWEST, HIGHEST = -3.0, 3.0
"""Targets between which one is searched: were partial sums Gaussian, .999 and .001 of the gates would be open."""

TRAININGS = 6
"""Targets that are tried for a budget."""


@dataclass(frozen=True)
class GatingSettings:
    """Everything that decides a gated network beside the dense one that it starts from.

    Attributes:
        training: Epochs, learning rate and so on.
        gating: Which inputs are the base, and how gates learn.
        target: T, the threshold that all channels are drawn to.
        pull: lambda, how strongly.
        teacher: Share of the dense network's answers in the loss, in [0, 1].
        temperature: Of the distillation.

    Raises:
        ValueError: A value that is not allowed; names the field.
    """

    training: TrainSettings
    gating: Gating = field(default_factory=Gating)
    target: float | int = 1.0
    pull: float | int = 1e-4
    teacher: float | int = 0.0
    temperature: float | int = 1.0

    def __post_init__(self) -> None:
        allowed = {
            "target": (math.isfinite(self.target), "a finite number"),
            "pull": (0 <= self.pull < math.inf, "a finite number from 0"),
            "teacher": (0 <= self.teacher <= 1, "a share in [0, 1]"),
            "temperature": (0 < self.temperature < math.inf, "a finite number above 0"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed is {what}")


PAPER = GatingSettings(
    TrainSettings(
        epochs=250,
        lr=0.1,
        batch_size=128,
        momentum=0.9,
        weight_decay=1e-4,
        label_smoothing=0.0,
        warmup=0.0,
        crop=4,
        flip=True,
        dtype="float32",
    )
)
"""The authors' script for ResNet-20 on CIFAR-10 (`train_cg`); G = 4, T = 1 from 0, alpha = 2, grouped, sparse."""

PAPER_POST_ACTIVATION = dataclasses.replace(
    PAPER,
    training=dataclasses.replace(PAPER.training, lr=0.08, weight_decay=3e-4),
    gating=Gating(parts=2),
    target=0.6,
)
"""The same for a `post_activated` ResNet-20 (`train_cg_postact`)."""


def scaled(task: Task, *, target: float | int = 1.0, epochs: int | None = None, seed: int = 0) -> GatingSettings:
    """The published constants for a training that is some hundred times shorter, from the dense network.

    Rule: the optimiser's settings are those of all gated networks (`prune_env.gates.gate_settings`), and lambda is what
    moves thresholds by `TRAVEL` time constants (`pull_of`; the authors' own training has some 12).

    Args:
        task: Whose dense network.
        target: T.
        epochs: Passes over the training split; None takes the data set's own.
        seed: Seed of order and augmentation.
    """
    training = gate_settings(task, epochs=EPOCHS.get(task.data, 2) if epochs is None else epochs, seed=seed)
    return GatingSettings(training, target=target, pull=pull_of(training, images=len(task.train)))


def pull_of(training: TrainSettings, *, images: int) -> float:
    """Lambda for `TRAVEL` time constants: one SGD step moves a threshold by 2 lambda lr / (1 - momentum) of its way."""
    steps = training.epochs * max(1, images // training.batch_size)
    rates = sum(one_cycle(training, step=step, steps=steps) for step in range(steps))
    return TRAVEL * (1 - training.momentum) / (2 * rates)


class PostActivationBlock(ResidualBlock):
    """A residual block that rectifies its branch before the addition, so that both convolutions can carry gates."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Convolve and rectify twice, add the shortcut."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(inner))) + self.shortcut(x)


def post_activated(network: nn.Module) -> nn.Module:
    """A copy whose residual blocks rectify before the addition: another function of the same weights, to be trained.

    Args:
        network: A network with blocks of `prune_env.tasks.resnet.ResidualBlock`.

    Raises:
        ValueError: It has no such block.
    """
    private = copy.deepcopy(network)
    blocks = [module for module in private.modules() if type(module) is ResidualBlock]
    if not blocks:
        raise ValueError(f"a {type(network).__name__} has no ResidualBlock that could rectify before its addition")
    for block in blocks:
        block.__class__ = PostActivationBlock
    return private


def attached(task: Task, gating: Gating) -> ChannelGatedNetwork:
    """The task's network with gates, and the statistics of its partial sums, ready to be trained.

    Raises:
        ValueError: It has no convolution that channel gating supports.
    """
    gated = attach(task.network, trace(task.network, task.example), task.example, gating)
    gated.calibrate(task.calibration(CALIBRATION)[0])
    return gated


def towards(gated: ChannelGatedNetwork, *, target: float | int, pull: float | int) -> Hook:
    """A hook that adds lambda sum (T - Delta)^2 to the loss."""
    thresholds = gated.thresholds
    return Hook(penalty=lambda state: pull * torch.stack([(target - own).square().sum() for own in thresholds]).sum())


def undecayed(network: nn.Module, settings: TrainSettings) -> Optimizer:
    """SGD with plain momentum, and no decay of what has one axis: thresholds, scales, shifts, biases."""
    groups: dict[float, list[nn.Parameter]] = {0.0: [], settings.weight_decay: []}
    for parameter in network.parameters():
        groups[settings.weight_decay if parameter.dim() > 1 else 0.0].append(parameter)
    options = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    return torch.optim.SGD(options, lr=settings.lr, momentum=settings.momentum)


def prepared(task: Task, settings: GatingSettings, *, progress: Progress | None = None) -> ChannelGatedNetwork:
    """The task's network with trained gates: from the cache, or by training them; a killed training is taken up again.

    Args:
        task: It is left as it is; its network is the teacher, where there is one.
        settings: What decides the outcome.
        progress: Told about every step.

    Raises:
        ValueError: A network without a convolution that can be gated, or a corrupt file in the cache.
        TrainingDiverged: The loss became NaN or Inf; the checkpoint holds the last good epoch.
    """
    gated = attached(task, settings.gating)
    hooks = [towards(gated, target=settings.target, pull=settings.pull)]
    if settings.teacher:
        hooks.append(distillation(task.network, share=settings.teacher, temperature=settings.temperature))
    train_once(
        gated,
        task,
        kind="channel-gating",
        content={"version": VERSION, **dataclasses.asdict(settings)},
        run=lambda checkpoint: train(
            gated,
            task.train,
            settings=settings.training,
            hooks=hooks,
            optimizer=undecayed,
            progress=progress,
            checkpoint=checkpoint,
        ),
        root=root_of(task),
    )
    return gated.eval()


def prepare(task: Task, seed: int, progress: Progress | None, *, epochs: int | None = None) -> Task:
    """Train the gates, which the surrogate then finds in the cache. The task's network is not changed."""
    prepared(task, scaled(task, epochs=epochs, seed=seed), progress=progress)
    return task


def surrogate(case: Case, *, epochs: int | None = None) -> Scores:
    """The surrogate of gates that are trained for the task; other groups keep the user's scores.

    A policy decides counts alone and knows no task: there, all groups keep them.
    """
    if case.task is None:
        return case.problem.scores
    gated, problem = prepared(case.task, scaled(case.task, epochs=epochs, seed=case.seed)), case.problem
    found = open_share(gated, problem.graph.groups, problem.evaluator.calibration)
    return {**problem.scores, **{name: share.double().numpy() for name, share in found.items()}}


def surrogate_after(epochs: int | None) -> Method:
    """The surrogate of gates that are trained for so many epochs; None takes the data set's own."""
    return Method(
        "channel_gating_surrogate",
        "extension of Hua et al., NeurIPS 2019 (arXiv 1805.12549): a static surrogate, how often gates open",
        prepare=partial(prepare, epochs=epochs),
        importance=partial(surrogate, epochs=epochs),
        epochs=lambda task: scaled(task, epochs=epochs).training.epochs,
    )


SURROGATE = surrogate_after(None)


def target_of(
    macs: Callable[[float], float],
    limit: float,
    *,
    low: float = LOWEST,
    high: float = HIGHEST,
    evaluations: int = TRAININGS,
) -> float:
    """The lowest target threshold whose mean macs meet a limit, by bisection.

    Args:
        macs: Target -> mean macs, falling but for noise; usually a training.
        limit: The most that may be spent.
        low: A target that is taken to spend too much.
        high: The highest target allowed, tried first.
        evaluations: How often `macs` may be asked, at least 1.

    Raises:
        ValueError: Not even the highest target meets the limit, or no evaluation is allowed.
    """
    if evaluations < 1:
        raise ValueError(f"evaluations is {evaluations}; 1 or more are allowed")
    if (spent := macs(high)) > limit:
        raise ValueError(f"budget {limit:,.0f} macs is not reached: the highest target, {high:g}, costs {spent:,.0f}")
    for _ in range(evaluations - 1):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(middle) <= limit else (middle, high)
    return high


def within(
    task: Task,
    settings: GatingSettings,
    budget: float | int,
    *,
    evaluations: int = TRAININGS,
    progress: Progress | None = None,
) -> GatingSettings:
    """The settings with the lowest target that meets a budget on training images; each target tried is a training.

    Args:
        task: It is left as it is.
        settings: Their target is not used.
        budget: Share of the dense macs in (0, 1], or a number of macs, that images may cost in the mean.
        evaluations: Trainings, at most.
        progress: Told about every step of each.

    Raises:
        ValueError: Not a budget, or one below what all gates closed, or the highest target, still cost.
        TrainingDiverged: The loss became NaN or Inf.
    """
    cost = GatingCost.of(attached(task, settings.gating))
    limit = Budget.of(budget, resource="macs", dense=cost.dense, minimum=cost.least).limit
    images, dtype = [task.calibration(CALIBRATION)], format_named(settings.training.dtype, "cpu")

    def macs(target: float) -> float:
        gated = prepared(task, dataclasses.replace(settings, target=target), progress=progress)
        return float(measure_gating(gated, images, dtype=dtype).macs.mean())

    return dataclasses.replace(settings, target=target_of(macs, limit, evaluations=evaluations))


@dataclass(frozen=True, eq=False)
class GatingResult:
    """A trained gated network and what it is worth.

    Attributes:
        settings: What decided it.
        gated: The network, in eval mode.
        search: Measured on the search split.
    """

    settings: GatingSettings
    gated: ChannelGatedNetwork = field(repr=False)
    search: GatingMeasurement
    _test: Split = field(repr=False)

    @cached_property
    def test(self) -> GatingMeasurement:
        """Measured on the test split: read on first access, once."""
        return measured(self.gated, self._test, self.settings)


def measured(gated: ChannelGatedNetwork, split: Split, settings: GatingSettings) -> GatingMeasurement:
    """A whole split, in the number format of the training."""
    return measure_gating(gated, split.batches(BATCH), dtype=format_named(settings.training.dtype, "cpu"))


def run_channel_gating(task: Task, settings: GatingSettings, *, progress: Progress | None = None) -> GatingResult:
    """Train a task's gated network, or take it from the cache, and measure it on the search split.

    Args:
        task: It is left as it is.
        settings: From `scaled`, `within`, `PAPER`, or your own.
        progress: Told about every step.

    Raises:
        ValueError: A network without a convolution that can be gated, or a corrupt file in the cache.
        TrainingDiverged: The loss became NaN or Inf.
    """
    gated = prepared(task, settings, progress=progress)
    return GatingResult(settings, gated, measured(gated, task.search, settings), task.test)
