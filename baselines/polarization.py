"""Polarization: a regulariser on BatchNorm scales that drives each to one of two poles, so that a valley says who goes.

Zhuang, Zhang, Huang, Zeng, Shuang, Li, "Neuron-level Structured Pruning using Polarization Regularizer", NeurIPS 2020;
constants as in the authors' code, https://github.com/polarizationpruning/PolarizationPruning. Beside it the plain L1
of Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017 (arXiv 1708.06519).

    min  mean loss + decay + lambda R_s(gamma)                                 eq. 1      `prepare`
    R_s(gamma) = t |gamma|_1 - |gamma - mean(gamma) 1|_1, gamma in [0, a]^n    eq. 2      `polarization`
    gamma <- clamp(gamma, 0, a) after each step, a = 1                                    `polarising`
    a group keeps what lies above its histogram's first local minimum          sect. 3.3  `own_ratios`
    bisect lambda, then move t, until the budget is met                        alg. 1     `polarization_search`

A global minimum of R_s has a share 1/2 - t/4 of the scales at a and the rest at 0 (theorem 3.2); following its
gradient alone ends nearer to min(1/2, 1 - t/2). How far a network comes, the loss decides.

**Meeting a budget.** A budget that the network's own ratios meet (1.0, say) changes nothing, however much less they
cost. Under a smaller one a threshold on |gamma|, the same for all groups, is raised from 0, and what is below it goes
as well, until the budget just holds: no group could have one more of its channels back. Far below the own ratios that
is a poor guide. A norm takes up any factor of the layer before it, so scales compare badly between layers, and a layer
of small ones may be left with one channel: look for a larger lambda instead (`polarization_search`).

Taken: R_s with its subgradient through the mean; the clamp; which scales (those of channels that can be pruned) and
one mean for all; the authors' threshold, group by group; lambda and t of each network; lambda by the cost of a layer's
channels as an option (`macs_span`). `polarization_paper` trains as published: from new weights and scales of .5, with
the published rates, epochs and batches. `polarization` goes on from the trained network for a twentieth of the epochs,
in one cycle, under a lambda that is as many times larger as the sum of all steps' learning rates is smaller (`scaled`).

Where we deviate:

- A trained network's scales start where they are; those outside [0, a] are clamped at the first step.
- Only regularised scales are clamped; the authors clamp every BatchNorm's.
- A channel of a residual stream has the scales of all norms that write or read it, and is worth the largest. The
  authors prune what the blocks add to the stream instead, with a scatter behind it, and never the stream itself; where
  the stream cannot be pruned, neither can what is added to it, here. Depthwise convolutions' norms count like others.
- A group keeps at least one channel (`min_channels`); the authors drop the block. Channels without a BatchNorm are
  left alone as long as the budget allows.
- The guard against valleys that are none (`clear_valley`) is ours; `polarization_paper` does without.
- Nesterov momentum, as in all training here. No input gates, no gates behind depthwise convolutions, no stop at a
  target cost.
- Fine-tuning without the regulariser, 200 epochs in the paper, is no part of the method: it is what comes after.
- Network slimming's own ratio is a percentile that its user names; here the budget names it. Its authors regularise
  all norms, not only those of channels that can be pruned.

Reported after fine-tuning, CIFAR-10: ResNet-56 93.80 -> 93.83 % at 47 % fewer macs, 92.63 % at 71 %; VGG-16 93.88 ->
93.92 % at 54 %. Network slimming by the same authors: ResNet-56 93.27 % at 48 %, 91.20 % at 68 %. They choose the best
epoch by the test split, and in an independent run uniform l1 pruning, fine-tuned as long, beats it on ResNet-56:
94.09, 93.90 and 93.14 % at 20, 40 and 60 % fewer macs, polarization 93.87, 93.35 and 92.72 (dense 94.08).

Ours, ResNet-20 on CIFAR-10, twelve epochs in all for every method, one seed, test split (`python -m
benchmarks.trained_papers`), dense 91.75 %: its own ratios keep .666 of the macs and come to 90.84, uniform l1 at those
macs to 91.12; at half the macs, lambda and t by algorithm 1, 89.43 against 90.12.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baselines.heuristics import one_ranking
from baselines.method import Method
from baselines.polarization_scales import UPPER, Site, first_valley, gathered, largest_scale, own_ratios, sites
from baselines.polarization_settings import PAPER, SLIMMING_PAPER, Settings, published, scaled
from baselines.preparation import prepared_task
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.surgery import BATCH_NORMS
from prune_env.pruning.tracing import trace
from prune_env.tasks.initialisation import initialise
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingState
from prune_env.tasks.training.loop import Progress

VERSION = 1
"""Part of the cache's key: raise it when the same settings give another network."""

Gamma = Float[Tensor, " scale"]


def polarization(gamma: Gamma, *, t: float, shares: Gamma) -> Float[Tensor, ""]:
    """R_s(gamma) = t |gamma|_1 - |gamma - mean(gamma) 1|_1 (eq. 2), each term times its layer's factor of lambda.

    It may be negative.

    Args:
        gamma: All regularised scales of the network, as one vector with one mean.
        t: What the L1 norm weighs.
        shares: Factor of lambda at each scale; the paper's form has ones.
    """
    return (shares * (t * gamma.abs() - (gamma - gamma.mean()).abs())).sum()


def subgradient(gamma: Gamma, *, t: float, shares: Gamma) -> Gamma:
    """The subgradient of R_s, through the mean as in the authors' code; a kink counts as flat.

        dR_s / dgamma_j = s_j (t sign(gamma_j) - sign(gamma_j - mean)) + (1/n) sum_i s_i sign(gamma_i - mean)

    For positive scales of which a share p is above the mean, and s = 1: t - 2 + 2p above the mean, t + 2p below.

    Args:
        gamma: All regularised scales.
        t: What the L1 norm weighs.
        shares: s, factor of lambda at each scale.
    """
    side = (gamma - gamma.mean()).sign()
    return shares * (t * gamma.sign() - side) + (shares * side).mean()


def slimming_subgradient(gamma: Gamma, *, t: float, shares: Gamma) -> Gamma:
    """The subgradient of t |gamma|_1 (Liu et al., eq. 1 with g(s) = |s|), each term times its factor."""
    return shares * t * gamma.sign()


def macs_shares(graph: LayerGraph, found: Sequence[Site], span: tuple[float, float]) -> Gamma:
    """Factor of lambda at each scale, by what one channel of its group costs (`--flops-weighted` of the code).

        s = low + (high - low) (d - min d) / (max d - min d), d = macs(full) - macs(full less one channel of the group)

    Args:
        graph: The network's graph.
        found: The regularised scales.
        span: low and high.
    """
    less = graph.full - torch.eye(len(graph.groups), dtype=torch.int64).numpy()
    saved = graph.cost["macs"](graph.full) - graph.cost["macs"](less)
    each = torch.tensor([saved[graph.position(site.group)] for site in found], dtype=torch.float32)
    place = (each - each.min()) / (each.max() - each.min()).clamp_min(1.0)
    low, high = span
    return (low + (high - low) * place).repeat_interleave(torch.tensor([len(site.index) for site in found]))


def regularising(found: Sequence[Site], gradient: Callable[[Gamma], Gamma]) -> Hook:
    """A hook that adds a gradient to those of some scales.

    Args:
        found: The scales.
        gradient: All of them as one vector -> what to add, lambda included.
    """

    @torch.no_grad()
    def add(state: TrainingState) -> None:
        parts = gradient(gathered(state.network, found)).split([len(site.index) for site in found])
        for site, part in zip(found, parts, strict=True):
            scale = state.network.get_submodule(site.module).weight
            assert isinstance(scale, Tensor)
            if scale.grad is not None:  # of a frozen norm there is none, and no step is taken
                scale.grad.index_add_(0, site.index.to(scale.device), part)

    return Hook(after_backward=add)


def clamping(found: Sequence[Site]) -> Hook:
    """A hook that moves some scales into [0, a] after each step."""

    @torch.no_grad()
    def clamp(state: TrainingState) -> None:
        for site in found:
            scale = state.network.get_submodule(site.module).weight
            assert isinstance(scale, Tensor)
            index = site.index.to(scale.device)
            scale.index_copy_(0, index, scale[index].clamp_(0.0, UPPER))

    return Hook(after_step=clamp)


def scheduling(settings: Settings) -> Hook:
    """A hook that sets the published learning rates in the place of the one cycle."""

    def set_rate(state: TrainingState) -> None:
        state.lr = settings.rate(state.epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr

    return Hook(before_step=set_rate)


def polarising(found: Sequence[Site], settings: Settings, shares: Gamma) -> Sequence[Hook]:
    """R_s times lambda, and the clamp."""

    def gradient(gamma: Gamma) -> Gamma:
        return settings.strength * subgradient(gamma, t=settings.t, shares=shares.to(gamma.device))

    return regularising(found, gradient), clamping(found)


def slimming(found: Sequence[Site], settings: Settings, shares: Gamma) -> Sequence[Hook]:
    """The L1 norm times lambda, and no clamp."""

    def gradient(gamma: Gamma) -> Gamma:
        return settings.strength * slimming_subgradient(gamma, t=settings.t, shares=shares.to(gamma.device))

    return (regularising(found, gradient),)


REGULARISERS: dict[str, Callable[[Sequence[Site], Settings, Gamma], Sequence[Hook]]] = {
    "polarization": polarising,
    "slimming": slimming,
}
"""Name -> (regularised scales, settings, factors of lambda) -> hooks."""


def prepare(
    task: Task,
    seed: int,
    progress: Progress | None,
    *,
    settings: Callable[[Task], Settings] = scaled,
    regulariser: str = "polarization",
) -> Task:
    """A prepare stage: the task with a network trained under a regulariser of its BatchNorm scales.

    Args:
        task: It is left as it is.
        seed: Seed of the order of images, and of new weights.
        progress: Told about every step.
        settings: Task -> how to train.
        regulariser: A name in `REGULARISERS`.

    Raises:
        ValueError: A network without a prunable channel that a BatchNorm scales, or a corrupt file in the cache.
        TrainingDiverged: The loss became NaN or Inf.
    """
    chosen, graph = settings(task), trace(task.network, task.example)
    found = sites(task.network, graph)
    hooks = [*REGULARISERS[regulariser](found, chosen, macs_shares(graph, found, chosen.macs_span))]
    if chosen.schedule:
        hooks.append(scheduling(chosen))
    if chosen.start is not None:
        task = dataclasses.replace(task, network=renewed(task.network, scale=chosen.start, seed=seed))
    return prepared_task(
        task,
        method=regulariser,
        constants={"version": VERSION, **dataclasses.asdict(chosen)},
        training=chosen.training(task, seed=seed),
        hooks=lambda network: hooks,
        progress=progress,
    )


def renewed(network: nn.Module, *, scale: float, seed: int) -> nn.Module:
    """A copy with new random weights, whose BatchNorms scale by a given number and shift by nothing.

    Layers are set anew as torch makes them, convolutions and linear layers as dense training starts; a bare parameter
    keeps its value.

    Args:
        network: It is left as it is.
        scale: Of every BatchNorm.
        seed: Seed of the weights.
    """
    network = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        initialise(network)
    for module in network.modules():
        if isinstance(module, BATCH_NORMS) and module.weight is not None:
            nn.init.constant_(module.weight, scale)
    return network


TITLE = "Zhuang et al. 2020 (Polarization, NeurIPS)"
POLARIZATION = Method(
    "polarization",
    f"{TITLE}: scales driven to two poles, from the trained network",
    prepare=partial(prepare, settings=partial(scaled, table=PAPER)),
    importance=largest_scale,
    allocate=own_ratios,
    epochs=lambda task: scaled(task, table=PAPER).epochs,
)
POLARIZATION_PAPER = Method(
    "polarization_paper",
    f"{TITLE}: the published training, from scratch",
    prepare=partial(prepare, settings=partial(published, table=PAPER)),
    importance=largest_scale,
    allocate=partial(own_ratios, threshold=first_valley),
    epochs=lambda task: published(task, table=PAPER).epochs,
)
SLIMMING = Method(
    "slimming",
    "Liu et al., ICCV 2017 (arXiv 1708.06519): L1 on the scales, one threshold for all groups",
    prepare=partial(prepare, settings=partial(scaled, table=SLIMMING_PAPER), regulariser="slimming"),
    importance=largest_scale,
    allocate=one_ranking,
    epochs=lambda task: scaled(task, table=SLIMMING_PAPER).epochs,
)
