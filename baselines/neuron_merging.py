"""Neuron Merging: Compensating for Pruned Neurons. Kim, Kim, Park and Jeon, NeurIPS 2020, arXiv 2010.13160.

After the cut, what a pruned channel sent to the next layer is added, scaled, to what its most similar kept channel
sends. No data, no fine-tuning, one pass over the dense weights; which channels go is somebody else's choice.

    W_i ~ Y_i Z_i        Y_i the kept neurons, Z_i non-negative with at most one entry in a column
    f(Z^T y) = Z^T f(y)  for such Z and f = ReLU, so the next layer takes Z_i up: W'_{i+1} = Z_i W_{i+1}
    conv: W'_{i+1} = W_{i+1} x_2 Z_i, and max or average pooling and a flatten on the way change nothing

A repair stage: `repair_by()` composes with every importance and allocation. It takes the place of the refit, and the
recalibration, where it is wanted, comes after it.

Taken from the authors' code (github.com/friendshipkim/neuron-merging, d25cf3e), which the numbers belong to: the scale
behind a BatchNorm has the ratio of the norms upside down relative to the algebra, and variances in place of standard
deviations. `Merging(formula="algebraic")` is what the algebra gives.

We differ where the code divides by zero or leaves the theorem: candidates without a finite scale (a zero gamma or an
empty filter) are passed over, a channel whose choice has a scale that is not positive (gammas of two signs) is dropped,
and the bias distance of a single candidate is 0. A bias before a norm counts as part of its running mean. Groups that
cannot be merged exactly (`merging_sites.unmergeable`) stay as they were cut.

LeNet-300-100 on Fashion-MNIST, the authors' weights, l1, accuracy in % (python -m benchmarks.merging_table):

    cut                 none    50 %    60 %    70 %    80 %
    reported, pruned   89.80   88.40   85.17   71.26   66.76
    reported, merged           88.69   86.92   82.75   80.02
    ours, pruned       89.80   88.40   85.17   71.26   66.76
    ours, merged               88.69   86.92   82.75   80.02

The paper measures without recalibration. With it merging loses to pruning alone on CIFAR ResNets: fresh statistics
repair more of the shift than merging does, and merging then adds its own error. Ask for `recalibrate=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from baselines.allocate import Counts
from baselines.merging_sites import Norm, absorb, filters, norm_of, unmergeable
from baselines.method import Case, Method
from prune_env.checks import check_name
from prune_env.pruning.consumer import complement
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.plan import Plan

Pairs = Float[Tensor, "pruned kept"]


def coded(ratio: Pairs, one: Norm, two: Norm) -> tuple[Pairs, Pairs]:
    """Scale and bias distance behind a norm as the authors' code has them (algorithm 3).

        Scale = s (gamma2 / gamma1) (var1 / var2)
        B = |(gamma2 / var2) (s (mean1 - var1 beta1 / gamma1) - mean2) + beta2| / Scale

    Args:
        ratio: s = ||w1|| / ||w2||.
        one: Norms of the pruned channels, `[pruned, 1]`.
        two: Norms of the kept channels, `[kept]`.
    """
    scale = ratio * (two.gamma / one.gamma) * (one.var / two.var)
    shift = (two.gamma / two.var) * (ratio * (one.mean - one.var * one.beta / one.gamma) - two.mean) + two.beta
    return scale, shift.abs() / scale


def algebraic(ratio: Pairs, one: Norm, two: Norm) -> tuple[Pairs, Pairs]:
    """Scale and bias distance for which BN1(s x) = Scale BN2(x) + B, with sigma = sqrt(var + eps).

        Scale = s (gamma1 / gamma2) (sigma2 / sigma1)
        B = (gamma1 / sigma1) (s (mean2 - sigma2 beta2 / gamma2) - mean1) + beta1

    |B| is in units of the pruned channel, so it compares one pruned channel's partners, as B / Scale does in `coded`; a
    partner whose gamma has the other sign is infinitely far.

    Args:
        ratio: s = ||w1|| / ||w2||.
        one: Norms of the pruned channels, `[pruned, 1]`.
        two: Norms of the kept channels, `[kept]`.
    """
    first, second = (one.var + one.eps).sqrt(), (two.var + two.eps).sqrt()
    scale = ratio * (one.gamma / two.gamma) * (second / first)
    shift = (one.gamma / first) * (ratio * (two.mean - second * two.beta / two.gamma) - one.mean) + one.beta
    return scale, torch.where(scale > 0, shift.abs(), torch.inf)


FORMULAS: dict[str, Callable[[Pairs, Norm, Norm], tuple[Pairs, Pairs]]] = {"coded": coded, "algebraic": algebraic}


@dataclass(frozen=True)
class Merging:
    """What decides who merges with whom.

    Attributes:
        threshold: Least cosine at which a channel with a norm is merged; below it the channel is dropped.
        plain_threshold: The same for a channel without a norm.
        lam: Weight of the cosine distance against the bias distance, where there is a norm.
        formula: Scale and bias distance behind a norm, a name in `FORMULAS`.

    Raises:
        ValueError: A number outside its range, or an unknown formula.
    """

    threshold: float = 0.1
    plain_threshold: float = 0.45
    lam: float = 0.85
    formula: str = "coded"

    def __post_init__(self) -> None:
        for name in ("threshold", "plain_threshold", "lam"):
            value, least = getattr(self, name), 0 if name == "lam" else -1
            if not least <= value <= 1:
                raise ValueError(f"{name} is {value}; {least} to 1 is allowed")
        check_name("formula", self.formula, FORMULAS)


PUBLISHED = {
    "fashion-mnist-lenet300100": Merging(plain_threshold=0.45),
    "cifar10-vgg16_bn": Merging(threshold=0.1, lam=0.85),
    "cifar100-vgg16_bn": Merging(threshold=0.1, lam=0.7),
    "cifar10-resnet56": Merging(threshold=0.1, lam=0.85),
    "cifar10-wrn-40-4": Merging(threshold=0.1, lam=0.8),
}
"""Task -> the authors' thresholds and lambda (their scripts); any other task takes the defaults of `Merging`."""

WIDTHS = {
    "cifar10-vgg16_bn": (32, 64, 128, 128, *(256,) * 9),
    "cifar100-vgg16_bn": (32, 64, 128, 128, 256, 256, 256, 512, 512, *(256,) * 4),
}
"""Task -> the authors' hand-set channels per convolution; their residual networks keep one share in every block."""


def decompose(
    weight: Float[Tensor, "channel weight"], norm: Norm | None, kept: Int64[Tensor, " kept"], settings: Merging
) -> Float[Tensor, "kept channel"]:
    """Z of W ~ Y Z (algorithm 1): unit columns for kept channels, one entry or none for each pruned one.

    Args:
        weight: What writes each channel, the bias included where no norm follows.
        norm: The norm behind it, if there is one.
        kept: Kept channels, rising.
        settings: Threshold, lambda and formula.
    """
    pruned = complement(kept.numpy(), len(weight))
    matrix = torch.zeros(len(kept), len(weight), dtype=torch.float64)
    matrix[torch.arange(len(kept)), kept] = 1.0
    length = weight.norm(dim=1)
    ratio, cosine = length[pruned, None] / length[kept], cosines(weight)[pruned][:, kept]
    if norm is None:
        # Algorithm 2: the scale is s itself, the distance the angle alone.
        scale, distance, threshold = ratio, 1 - cosine, settings.plain_threshold
        known = scale.isfinite()
    else:
        scale, offset = FORMULAS[settings.formula](ratio, norm[pruned[:, None]], norm[kept])
        known = scale.isfinite() & offset.isfinite()
        distance = settings.lam * (1 - cosine) + (1 - settings.lam) * scaled_to_unit(offset, known)
        threshold = settings.threshold
    partner = distance.masked_fill(~known, torch.inf).argmin(dim=1)
    row = torch.arange(len(pruned))
    merged = (known & (scale > 0) & (cosine >= threshold))[row, partner]
    matrix[partner[merged], pruned[merged]] = scale[row, partner][merged]
    return matrix


def cosines(weight: Float[Tensor, "channel weight"]) -> Float[Tensor, "channel channel"]:
    """Cosine of every two channels; 0 with a channel that is all zero."""
    length = weight.norm(dim=1)
    across = length[:, None] * length
    return torch.where(across > 0, weight @ weight.T / across, 0.0).clamp(-1, 1)


def scaled_to_unit(offset: Pairs, known: Bool[Tensor, "pruned kept"]) -> Pairs:
    """Bias distances of each pruned channel's candidates moved to [0, 1]; 0 where there is nothing to tell apart."""
    least = offset.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    spread = offset.masked_fill(~known, -torch.inf).amax(dim=1, keepdim=True) - least
    return torch.where(known & (spread > 0), (offset - least) / spread, 0.0)


def merge(
    network: nn.Module,
    small: nn.Module,
    graph: LayerGraph,
    plan: Plan,
    *,
    settings: Merging,
    leave: Collection[str] = (),
) -> None:
    """Merge the pruned channels of a cut network into the kept ones, in place.

    Args:
        network: The dense network; scales come from its weights, so the order of the groups does not matter.
        small: The same network cut by `plan`.
        graph: The graph of both.
        plan: What is kept.
        settings: Threshold, lambda and formula.
        leave: Groups to leave as they were cut: `unmergeable`.
    """
    mixes = {}
    for group in graph.groups:
        kept = plan.keep.get(group.name, ())
        if 0 < len(kept) < group.channels and group.name not in leave:
            weight, norm = filters(network, group), norm_of(network, group)
            mixes[group.name] = decompose(weight, norm, torch.tensor(kept), settings)
    absorb(network, small, graph, plan, mixes)


def repair_by(settings: Merging | None = None) -> Callable[[Case, Plan], nn.Module]:
    """Merging as a repair stage, for any method.

    Args:
        settings: None takes what the authors used for the task (`PUBLISHED`).

    Returns:
        (case, plan) -> cut, merged, and recalibrated if the problem says so.
    """

    def repair(case: Case, plan: Plan) -> nn.Module:
        evaluator = case.problem.evaluator
        chosen = settings or PUBLISHED.get(case.problem.name, Merging())

        def merged(small: nn.Module, plan: Plan) -> None:
            leave = unmergeable(evaluator.network, evaluator.graph, evaluator.calibration[:1])
            merge(evaluator.network, small, evaluator.graph, plan, settings=chosen, leave=leave)

        return evaluator.realise(plan, repair=merged)

    return repair


def published_widths(case: Case) -> Counts:
    """The authors' channels per layer, as an allocation: `replace(NEURON_MERGING, allocate=published_widths)`.

    Raises:
        ValueError: There are none for the task, or they are over the budget.
    """
    widths = WIDTHS.get(case.problem.name)
    if widths is None or len(widths) != len(case.choices.levels):
        raise ValueError(f"no published widths fit {case.problem.name!r}; there are some for {', '.join(WIDTHS)}")
    counts = np.array(widths, dtype=np.int64)
    if not case.choices.fits(counts):
        raise ValueError(f"the published widths cost {float(case.choices.cost(counts)):,.0f}, more than the budget")
    return counts


NEURON_MERGING = Method(
    "neuron_merging",
    "Kim et al. 2020 (Neuron Merging, arXiv 2010.13160): pruned channels merged into the most similar kept ones",
    repair=repair_by(),
)
