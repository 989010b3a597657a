"""AMC: a DDPG agent walks through the network and says for each layer which share of its input channels is kept.

He, Lin, Liu, Wang, Li, Han, "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018
(https://arxiv.org/abs/1802.03494); constants from the authors' code, https://github.com/mit-han-lab/amc.

Taken, for a layer t that is the first to read a group:

    state   s_t = (t, n, c, h, w, stride, k, FLOPs[t], reduced, rest, a_{t-1}), each in [0, 1]             eq. 1
    noise   a_t ~ TN(mu(s_t), sigma^2, 0, 1), sigma = .5 * .95^e in episode e after the warm-up            eq. 2
    critic  y_t = R - b + gamma Q'(s_{t+1}, mu'(s_{t+1})); R is the whole episode's reward in every        eq. 3
            step, b the moving average of the batches' mean rewards, gamma = 1
    reward  resource-constrained: R = -Error, which is `reward="accuracy"` moved by one (b takes it off);
            accuracy-guaranteed: R = -Error log(FLOPs), which is `reward="accuracy_guaranteed", budget=1`  eq. 4-5
    bounds  a_t <= what the budget leaves if all later layers go to their minimum                  algorithm 1

The noise starts after a warm-up of uniformly random episodes, in which nothing is learnt; then there is one update for
each stored step. Channels are chosen by the l1 norm of the weights that read them, and the readers' weights are solved
anew by least squares (`refit="sequential"`, `prune_env.pruning.sequential`). Nothing is fine-tuned before the reward.
The equations are those of the authors' code; their numbers here were not checked against the paper's text. What needs
an SB3 agent is in `agents.amc`:

    python -m agents.train --algorithm amc            # scaled down, see `SMALL`
    python -m agents.train --algorithm amc_paper      # `PAPER`; every option can still be given beside it

Where we deviate:

- The budget holds for whole channels: `prune_env.envs.dynamics.outlook` clamps the counts, after the action was rounded
  up to a multiple of 8. The authors clamp the ratio and then round up, so that the last layer may go over the budget.
- A group that several layers read is one decision, described by the first of them, and `reduced` is what the decided
  groups take off the exact cost with all later ones whole (the authors' code assumes these at their minimum).
- h and w are the side of a square map with the layer's number of positions. A column that is equal in all layers is 0;
  the authors' code leaves it as it is, and has #weights and the layer's type in place of h, w and FLOPs.
- The actor ends in tanh over twice the range, which is the paper's sigmoid of twice the logit.
- A batch may hold a step twice: the replay draws with replacement.
- Least squares reads the pruned network's inputs with a ridge, at 32 positions per image; the authors' code reads the
  dense network's (as `refit="moments"` does) at 10, and knows 1x1 convolutions and linear layers only.
- Top-1 accuracy on the task's search split (2,000 images of CIFAR-10); the authors: top-5 of ImageNet, 3,000 images,
  and 5,000 of CIFAR-10.
- 100 random episodes; a comparison in the authors' code makes them 101. The 800 in all are the code's.

Reported, CIFAR-10 at half the FLOPs after fine-tuning: ResNet-56 92.8 -> 91.9 %, Plain-20 90.5 -> 90.2 %; ImageNet:
MobileNet-V1 at half 70.6 -> 70.2 %, V2 at 70 % 71.8 -> 70.8 %.

Ours, digits-cnn right after the cut, accuracy on the search split, means of seeds 0, 1, 2, 200 episodes each (`python
-m agents.train --algorithm amc --budget .3`; `--algorithm td3 --min-keep .2 --budget .3`). `learned` is a run's best
episode, `policy` the agent's own last plan:

    | macs | uniform | best of 200 random | amc learned | policy | td3 learned | policy |
    |------|---------|--------------------|-------------|--------|-------------|--------|
    | .30  | .894    | .968               | .963        | .956   | .982        | .969   |
    | .15  | .629    | .787               | .731        | .703   | .776        | .766   |

So the agent beats uniform, and its own random episodes (whose mean is .613 and .465), but not the best of as many
random plans that spend the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from prune_env.envs import dynamics
from prune_env.envs.dynamics import Problem, State
from prune_env.pruning.graph import Group, Layer, LayerGraph

FEATURES = ("t", "n", "c", "h", "w", "stride", "k", "flops", "reduced", "rest", "previous")
"""Entries of the state: index, output and input channels, sides of the map that is read, stride and kernel of the
layer, its macs, macs that the decisions so far removed, macs of the layers behind it, the share kept in the step
before."""
KNOWN = 8
"""The first entries are known before the episode."""


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters; the defaults are the authors'.

    Attributes:
        episodes: Networks that are cut and measured.
        warm_up: The first of them, uniformly random.
        sigma: Width of the noise when it starts.
        decay: What the width is multiplied with after each episode.
        hidden: Units of the two hidden layers of actor and critic.
        actor_lr: Adam's learning rate for the actor.
        critic_lr: Adam's learning rate for the critic.
        tau: Share of the new weights that the target networks take.
        gamma: Discount.
        batch_size: Steps in a batch.
        updates: Batches per stored step.
        replay_episodes: The replay holds as many steps as so many episodes have.
        baseline_rate: How far the reward's baseline moves to a batch's mean.
        min_keep: Least share that a layer keeps; the most is 1.
        round_to: Kept channels are a multiple of it.
        importance: Which channels are kept.
        refit: How the readers of removed channels are solved anew.
        recalibrate: Whether BatchNorm statistics are estimated anew.
        calibration_images: What the least squares read.
    """

    episodes: int = 800
    warm_up: int = 100
    sigma: float = 0.5
    decay: float = 0.95
    hidden: tuple[int, int] = (300, 300)
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    tau: float = 0.01
    gamma: float = 1.0
    batch_size: int = 64
    updates: int = 1
    replay_episodes: int = 100
    baseline_rate: float = 0.5
    min_keep: float = 0.2
    round_to: int = 8
    importance: str = "l1_inputs"
    refit: str = "sequential"
    recalibrate: bool = False
    calibration_images: int = 3000

    def width(self, episode: int) -> float:
        """Width of the noise (eq. 2) in an episode after the warm-up; the first of them is 0."""
        return self.sigma * self.decay**episode

    @property
    def options(self) -> dict[str, Any]:
        """What it says of a run that any algorithm could be told as well."""
        names = ("episodes", "warm_up", "min_keep", "round_to", "importance", "refit", "recalibrate")
        return {name: getattr(self, name) for name in (*names, "calibration_images")}


PAPER = Preset()
"""As in the authors' code, which took 60 batches of 50 images for the least squares."""
SMALL = Preset(
    episodes=200,
    warm_up=50,
    updates=4,
    round_to=1,
    importance="l1",
    refit="auto",
    recalibrate=True,
    calibration_images=512,
)
"""Scaled down, not the paper's setting: a quarter of the episodes with four updates per step, which makes about as many
updates; and the repair that all algorithms here have by default, so that they can be compared. Counts are not rounded:
a layer of 16 channels would have two choices."""


def truncated_normal(
    rng: np.random.Generator, mean: float, sigma: float, *, low: float = 0.0, high: float = 1.0
) -> float:
    """A draw of TN(mean, sigma^2, low, high), by rejection; without noise (or luck), the mean moved inside."""
    for _ in range(20 if sigma > 0 else 0):
        value = rng.normal(mean, sigma)
        if low <= value <= high:
            return float(value)
    return float(np.clip(mean, low, high))


def moved_baseline(before: float, rewards: Float[np.ndarray, " step"], *, rate: float) -> float:
    """The baseline of eq. 3 after a batch; `before` is NaN for the first one, whose mean it begins with."""
    mean = float(np.mean(rewards, dtype=np.float64))
    return mean if np.isnan(before) else before + rate * (mean - before)


def rounded_up(allowed: Int64[np.ndarray, " count"], channels: int, share: float) -> float:
    """The share that a ratio in [0, 1] stands for: the nearest count, then up to one that is allowed.

    What the budget allows is none of its business: the env moves the count down to the largest affordable one.

    Args:
        allowed: Counts that the group may keep, rising.
        channels: Of the whole group.
        share: The action.
    """
    at = np.searchsorted(allowed, np.rint(share * channels))
    return float(allowed[min(int(at), len(allowed) - 1)] / channels)


def known_features(problem: Problem) -> Float[np.ndarray, "step feature"]:
    """The states (eq. 1) as far as they are known before an episode: each column min-max scaled, `rest` a share."""
    graph = problem.graph
    layers = [reader(graph, graph.groups[step]) for step in problem.steps]
    raw = np.array([_shape(t, layer) for t, layer in enumerate(layers)])
    low, span = raw.min(axis=0), np.ptp(raw, axis=0)
    table = np.zeros((len(layers), len(FEATURES)))
    table[:, :KNOWN] = (raw - low) / np.where(span > 0, span, 1.0)
    behind = np.cumsum([layer.macs for layer in graph.layers[::-1]])[::-1]
    places = [graph.layers.index(layer) for layer in layers]
    table[:, FEATURES.index("rest")] = [(behind[at] - graph.layers[at].macs) / behind[0] for at in places]
    return table


def state_of(
    problem: Problem, known: Float[np.ndarray, "step feature"], state: State
) -> Float32[np.ndarray, " feature"]:
    """The state (eq. 1) of the next step; at the end of an episode, of the last one.

    Args:
        problem: What is decided.
        known: From `known_features`.
        state: Where the episode is.
    """
    at = state.position
    found = known[min(at, len(known) - 1)].copy()
    macs = problem.graph.cost["macs"]
    found[FEATURES.index("reduced")] = 1.0 - macs(dynamics.counts(problem, state)) / macs(problem.graph.full)
    found[FEATURES.index("previous")] = state.kept[-1] / problem.channels[at - 1] if at else 1.0
    return found.astype(np.float32)


def reader(graph: LayerGraph, group: Group) -> Layer:
    """The layer whose input channels a group is; of several the first, and without any the one that writes them."""
    slots = group.consumers or group.producers
    return graph.layer(slots[0].module)


def _shape(t: int, layer: Layer) -> tuple[int | float, ...]:
    """The known entries of a state, unscaled."""
    stride, kernel = max(layer.stride, default=0), max(layer.kernel, default=1)
    side = math.sqrt(layer.positions) * max(stride, 1)
    return (t, layer.out_channels, layer.in_channels, side, side, stride, kernel, layer.macs)
