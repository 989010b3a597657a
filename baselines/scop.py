"""SCOP: channels that are as well off with features of other images. Tang, Wang, Xu, Tao, Xu, Xu, Xu, NeurIPS 2020.

"SCOP: Scientific Control for Reliable Neural Network Pruning", https://arxiv.org/abs/2010.10732; constants and formulas
as in the authors' code, https://github.com/yehuitang/Pruning, SCOP_NeurIPS2020. The paper numbers its equations; the
numbers are not given here, for only the code could be checked.

Taken, line by line:

    A_mix = beta (.) A + (1 - beta) (.) A~            behind each convolution, before its norm (`scop_layers`)
    beta <- Adam on the cross-entropy of the real images, from 1/2, clamped to [0, 1] after each step; all else frozen
    I_c = |gamma_c| (beta_c - beta~_c) = |gamma_c| (2 beta_c - 1)          signed: the absolute value is of gamma alone
    the same share of every layer goes, lowest I first
    one pass over the training images in training mode, which moves the norms' statistics (`published_repair`)

A and A~ are what a layer writes for a real image and for its control. Control images are the same batch in random
order, as in the authors' later port (https://github.com/mindspore-ai/golden-stick, scop_pruner.py), or knockoffs from a
small generator (`Settings(control="generator")`, `scop_knockoffs`): the paper's GAN is not to be had.

Where we deviate:

- A selection layer stands behind everything that writes a prunable group: stem and shortcuts too, where a stream is
  pruned, and linear layers, which the paper has none of. The authors leave stem and shortcuts whole and prune the end
  of a block by itself, zeros in its place (`scop_layers.sliced`); a coupled group lives or dies as one, and its score
  is the sum over its writers. Block ends that no plan can prune have no selection layer.
- Norms are in evaluation mode while beta is learned. The authors' are in training mode, with statistics of real and
  control images together, and end up with running statistics of the mixture.
- The loss is that of the real images, as in the paper's code. The port trains on the permuted ones, too.
- No fine-tuning: one shot. They tune the masked network for 120 epochs and slice it at the end.
- `keep=` rounds to the nearest count; they keep C - int(rate C) (`scop_layers.kept_at_rate`).
- Where there is no task (a policy has the problem alone), beta is learned on the calibration images, and their labels
  are what the dense network says.

Not in the paper, and named so: allocations that decide how much of a layer goes. `negative` keeps I > 0, the channels
that beat the control. `false_discoveries` keeps I >= T, with the threshold of the knockoff+ filter

    T = min { t > 0 among |I| : (1 + #{c : I_c <= -t}) / max(1, #{c : I_c >= t}) <= q }

of Barber and Candes, Controlling the False Discovery Rate via Knockoffs, Annals of Statistics 43(5), 2015, over the
channels of all groups at once. Its guarantee does not carry over: permuted images are no knockoffs, and I is no
statistic that changes its sign with them. What either keeps is the most that it will spend: a budget that it does not
need is left, one of 1 included, and for a tighter one the threshold on I, the same for all groups, rises until it fits.

Published cuts, all convolutions inside the blocks at one rate (`scop_layers.published_cuts`;
`pytest tests/methods/test_scop.py -k published`), in %:

    | network, rate  | reported, macs | params | ours, macs | params |
    |----------------|----------------|--------|------------|--------|
    | ResNet-18, .30 | 38.8           | 39.3   | 38.1       | 39.3   |
    | ResNet-18, .35 | 45.0           | 43.5   | 43.5       | 45.0   |
    | ResNet-50, .35 | 45.3           | 42.8   | 45.4       | 42.8   |

They print no rates; these fit best. In the second row the columns seem to have changed places. For ResNet-50 they
report 54.6 and 51.8 as well, which no rate gives (.44: 54.7 and 51.3; .45: 55.6 and 52.2).

Reported after fine-tuning, ImageNet, top-1 error in %, in the order of the table: 30.24 -> 30.82, 30.24 -> 31.38,
23.85 -> 24.05; ResNet-50 at the larger cut 24.74. For CIFAR-10 no source could be checked. Ours, ResNet-20
on CIFAR-10 at half the macs, twelve epochs in all, one seed, test split (`python -m benchmarks.trained_papers`): 91.75
-> 89.90 % accuracy, uniform l1 90.12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from baselines import allocate
from baselines.allocate import Choices, Counts
from baselines.method import Case, Method, Scores, given_repair
from baselines.potential import Curve, Vector, kept, ranked
from baselines.scop_layers import ControlledNetwork, group_scores, permuted, writers_of
from baselines.scop_learning import NETWORK, Settings, Source, learned, observed
from prune_env.envs.dynamics import Problem
from prune_env.number_format import autocast, format_named
from prune_env.pruning.measure import evaluating
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import BATCH_NORMS, cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.dense import usual_training
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainSettings
from prune_env.tasks.training.augmentation import augment
from prune_env.tasks.training.loop import Progress

BATCH = 128
"""Images of a gradient that is taken without training."""
LEVEL = 0.1
"""q of the knockoff+ filter; the default of its authors' package."""


def prepare(task: Task, seed: int, progress: Progress | None, *, settings: Settings) -> Task:
    """Learn the scales, which the importance then finds in the cache. The task's network is not changed."""
    source = Source(task.train, task.data, seed, task, progress)
    learned(task.network, trace(task.network, task.example), source, settings)
    return task


_OBSERVED: WeakKeyDictionary[object, dict[tuple[Settings, int], Scores]] = WeakKeyDictionary()
"""Evaluator -> scores learned without a task: a policy asks again for each budget."""


def importance(case: Case, *, settings: Settings) -> Scores:
    """Group name -> I of each channel, the sum over the layers that write it."""
    graph, task = case.problem.graph, case.task
    if task is not None:
        source = Source(task.train, task.data, case.seed, task)
        return group_scores(learned(task.network, graph, source, settings), graph, task.example)
    evaluator = case.problem.evaluator
    known, key = _OBSERVED.setdefault(evaluator, {}), (settings, case.seed)
    if key not in known:
        source = Source(observed(case.problem), "", case.seed)
        controlled = learned(evaluator.network, graph, source, settings)
        known[key] = group_scores(controlled, graph, evaluator.calibration[:1].cpu())
    return known[key]


def knockoff_plus(scores: Float[np.ndarray, " channel"], level: float) -> float:
    """Threshold T of the knockoff+ filter; infinite if no threshold keeps the false discoveries below the level.

    Args:
        scores: I of all channels; the sign says who won.
        level: q, the share of false discoveries that is aimed at.
    """
    for least in np.unique(np.abs(scores[scores != 0])):
        if (1 + np.count_nonzero(scores <= -least)) / max(1, np.count_nonzero(scores >= least)) <= level:
            return float(least)
    return float("inf")


def positive(scores: Float[np.ndarray, " channel"]) -> Bool[np.ndarray, " channel"]:
    """Channels that beat the control."""
    return scores > 0


def discovered(scores: Float[np.ndarray, " channel"], *, level: float = LEVEL) -> Bool[np.ndarray, " channel"]:
    """Channels that the knockoff+ filter selects."""
    return scores >= knockoff_plus(scores, level)


def self_deciding(
    case: Case, *, keep: Callable[[Float[np.ndarray, " channel"]], Bool[np.ndarray, " channel"]]
) -> Counts:
    """As many channels as a rule on the scores of all groups keeps; one threshold for all where that is over budget.

    A group keeps its minimum (`min_channels`) whatever the rule says, and the lowest level that holds what it keeps.

    Args:
        case: With learned scores.
        keep: I of the channels of all groups to decide, one after another -> which stay.
    """
    names = [case.problem.graph.groups[step].name for step in case.problem.steps]
    scores = [np.asarray(case.scores[name], dtype=np.float64) for name in names]
    chosen = np.split(keep(np.concatenate(scores)), np.cumsum([len(score) for score in scores])[:-1])
    wanted = (
        levels[: np.searchsorted(levels, np.count_nonzero(stays)) + 1]
        for levels, stays in zip(case.choices.levels, chosen, strict=True)
    )
    return allocate.ranking(Choices(tuple(wanted), case.choices.cost, case.choices.limit), scores)


negative = partial(self_deciding, keep=positive)
false_discoveries = partial(self_deciding, keep=discovered)


def evidence(scores: Vector) -> Curve:
    """Share of the evidence for channels that a cut keeps, less the share of the evidence against, by count.

        sum_kept max(I, 0) / sum_all max(I, 0) - sum_kept max(-I, 0) / sum_all max(-I, 0)

    Args:
        scores: I of one group, those first that stay longest.
    """
    return kept(scores.clip(min=0)) - kept((-scores).clip(min=0))


def unlearned(problem: Problem) -> Scores:
    """I without training: |gamma| times what the first step would do to 2 beta - 1, the largest step being 1.

    That is minus the gradient of the cross-entropy by beta at its start of 1/2, on the calibration images; control is
    the batch in random order, labels are what the dense network says.
    """
    network, images = problem.evaluator.network, problem.evaluator.calibration
    controlled = ControlledNetwork(network, writers_of(problem.graph), control=permuted, start=DEFAULT.start)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for batch in images.split(BATCH):
            answers = controlled.eval()(batch).argmax(1)
            functional.cross_entropy(controlled.train()(batch), answers, reduction="sum").backward()
    # Behind `backward` none is None, which torch's types cannot say.
    slopes = cast("list[Tensor]", [selection.beta.grad for selection in controlled.layers])
    steepest = max(float(slope.abs().max()) for slope in slopes) or 1.0
    with torch.no_grad():
        for selection, slope in zip(controlled.layers, slopes, strict=True):
            selection.beta.copy_((1 - slope / steepest) / 2)
    return group_scores(controlled.eval(), problem.graph, images[:1])


def evidence_kept(problem: Problem) -> dict[str, Curve]:
    """For shaping: the evidence that the cut of each group keeps (`evidence`).

    An extension, not in the paper. Beta is not learned: I is that of `unlearned`.
    """
    scores = unlearned(problem)
    return {group.name: evidence(scores[group.name][ranked(problem, group)]) for group in problem.graph.groups}


def published_repair(case: Case, plan: Plan, *, settings: Settings) -> nn.Module:
    """Cut, then the paper's pass over the training images, in the place of refit and recalibration.

    Without a task it is the usual repair.
    """
    evaluator, task = case.problem.evaluator, case.task
    if task is None or np.array_equal(evaluator.graph.counts(plan), evaluator.graph.full):
        return given_repair(case, plan)
    small = cut(evaluator.network, evaluator.graph, plan).eval().to(memory_format=torch.channels_last)
    usual = usual_training(task.data, NETWORK, seed=case.seed)
    renew_statistics(small, task.train, dataclasses.replace(usual, batch_size=settings.pass_size or usual.batch_size))
    return small


@torch.no_grad()
def renew_statistics(network: nn.Module, split: Split, settings: TrainSettings) -> None:
    """One pass over a split with norms in training mode, in place: statistics move by each norm's momentum.

    Unlike `recalibrate` it forgets the dense statistics only as far as the batches go: after n, momentum .1 leaves
    .9^n of them. Only norms are in training mode; the authors' networks have no dropout.

    Args:
        network: In evaluation mode, before and after.
        split: Training images, augmented as in training.
        settings: Batch size, augmentation and seed.
    """
    norms = [m for m in network.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    device = next(network.parameters()).device
    draws = torch.Generator().manual_seed(settings.seed)
    with evaluating(network), autocast(device, format_named(settings.dtype, device)):
        try:
            for norm in norms:
                norm.training = True
            for positions in torch.randperm(len(split), generator=draws).split(settings.batch_size):
                if len(positions) > 1:  # a single image has no variance
                    pixels = augment(split.pixels(positions), crop=settings.crop, flip=settings.flip, generator=draws)
                    network(split.normalise(pixels.to(device)).contiguous(memory_format=torch.channels_last))
        finally:
            for norm in norms:
                norm.training = False


def learning_by(method: Method, settings: Settings) -> Method:
    """The method with scales that are learned otherwise."""

    def epochs(task: Task) -> int:
        return settings.training(data=task.data, images=len(task.train), seed=0).epochs

    stages = {"prepare": partial(prepare, settings=settings), "importance": partial(importance, settings=settings)}
    return dataclasses.replace(method, **stages, epochs=epochs)


DEFAULT = Settings()
PAPER = Settings(epochs=20, batch_size=512, pass_size=1024)
"""The authors' constants, for ImageNet; there are no others in their code."""

TITLE = "Tang et al., NeurIPS 2020 (SCOP, arXiv 2010.10732)"
SCOP = learning_by(Method("scop", f"{TITLE}: scales against a control, a shorter training"), DEFAULT)
SCOP_PAPER = learning_by(
    Method(
        "scop_paper",
        f"{TITLE}: the published constants and repair",
        repair=partial(published_repair, settings=PAPER),
    ),
    PAPER,
)
SCOP_NEGATIVE = learning_by(
    Method("scop_negative", "extension of SCOP: what does not beat the control goes", allocate=negative), DEFAULT
)
SCOP_FDR = learning_by(
    Method("scop_fdr", "extension of SCOP: what the knockoff+ filter selects stays", allocate=false_discoveries),
    DEFAULT,
)
