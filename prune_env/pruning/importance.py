"""Static importances: one number per channel of a group, higher = keep.

Every formula works on a *unit*: all filters of all producers that one channel of the group stands for, so coupled
layers and layers with several positions per channel need no case of their own. Scores are raw: they rank the
channels of one group; between groups only `second_order`, `taylor`, `obd` and `lamp` have a common scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from prune_env.checks import check_name
from prune_env.pruning.activations import channels_last, evaluating, pooled
from prune_env.pruning.consumer import oriented, weights_of
from prune_env.pruning.graph import Group, LayerGraph, Slot
from prune_env.pruning.moments import Moments, collect
from prune_env.pruning.sensitivity import Shares, largest, sample_size, sensitivities, summed
from prune_env.pruning.surgery import tensor_axes
from prune_env.pruning.torch_pruning_scores import TORCH_PRUNING, torch_pruning_scores

Batch = tuple[Tensor, Tensor]
"""Normalised images and their labels."""
Scores = dict[str, Tensor]
"""Group name -> `[channels]`."""
TAYLOR_BATCH = 32
"""Images per gradient of the Taylor and the optimal brain damage importance."""
RANK_IMAGES = 50
"""Images whose maps are ranked: each costs a singular value decomposition per channel and consumer."""
RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest count as zero: well above the rounding of float32."""


class Importance(Protocol):
    """A static importance of one group's channels."""

    def __call__(self, network: nn.Module, group: Group, batch: Batch) -> Float[Tensor, " channel"]:
        """Higher = keep. The network stays as it is."""
        ...


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at, for all groups at once.

    Attributes:
        network: The dense network.
        groups: The groups to score.
        batch: Normalised images and labels.
        moments: Second moments, if they were collected already.
        seed: Seed of what is random.
    """

    network: nn.Module
    groups: Sequence[Group]
    batch: Batch
    moments: Moments | None = None
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """An `Importance` that scores any number of groups in one pass.

    Attributes:
        rank: Scores of all groups of some evidence.
    """

    rank: Callable[[Evidence], Scores]

    def __call__(self, network: nn.Module, group: Group, batch: Batch) -> Float[Tensor, " channel"]:
        """Scores of one group."""
        return self.rank(Evidence(network, (group,), batch))[group.name]


def score(
    name: str, network: nn.Module, graph: LayerGraph, batch: Batch, *, moments: Moments | None = None, seed: int = 0
) -> Scores:
    """Scores of all groups by a named importance, in one pass.

    Args:
        name: An entry of `IMPORTANCES`.
        network: The dense network; parameters, gradients, mode and random state stay as they are.
        graph: Its graph.
        batch: Normalised images and labels, on the network's device.
        moments: Second moments for `second_order`; None collects them from the images.
        seed: Seed of `random`.

    Returns:
        Group name -> `[channels]` float32 on the CPU, higher = keep.

    Raises:
        ValueError: There is no such importance.
    """
    check_name("importance", name, IMPORTANCES)
    return IMPORTANCES[name].rank(Evidence(network, graph.groups, batch, moments, seed))


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def l1(evidence: Evidence) -> Scores:
    """Sum of the absolute weights of a unit (Li et al., ICLR 2017)."""
    return {group.name: _total(w.abs().sum((1, 2)) for w in _filters(evidence, group)) for group in evidence.groups}


def l1_inputs(evidence: Evidence) -> Scores:
    """Sum of the absolute weights that read a unit, over all consumers (AMC: He et al., ECCV 2018)."""
    scores = {group.name: torch.zeros(group.channels) for group in evidence.groups}
    for group in evidence.groups:
        for slot in group.consumers:
            weight = oriented(evidence.network.get_submodule(slot.module)).abs()
            scores[group.name] += _per_channel(weight.sum(0).reshape(weight.shape[1], -1).sum(1), slot, group)
    return scores


def l2(evidence: Evidence) -> Scores:
    """Euclidean norm of a unit's weights."""
    return {
        group.name: _total(w.square().sum((1, 2)) for w in _filters(evidence, group)).sqrt()
        for group in evidence.groups
    }


def lamp(evidence: Evidence) -> Scores:
    """Squared norm of a unit over the sum of all squared norms that are no smaller (Lee et al., ICLR 2021).

    The paper's score of a weight, taken over units. Inside a group it ranks as `l2` does; the largest unit of every
    group has 1, so that one threshold for all groups never empties one.
    """
    scores = {}
    for name, norms in l2(evidence).items():
        energy, order = norms.double().square().sort(descending=True)
        # Among equals the sum holds all of them: they score the same.
        last = torch.searchsorted(-energy, -energy, right=True) - 1
        share = energy / energy.cumsum(0)[last].clamp_min(torch.finfo(energy.dtype).tiny)
        scores[name] = torch.zeros_like(norms).scatter_(0, order, share.float())
    return scores


def geometric_median(evidence: Evidence) -> Scores:
    """Sum of the distances to the other units, sum_j ||w_c - w_j||, on raw weights (He et al., CVPR 2019, eq. 6).

    The units nearest to the geometric median of all units can be replaced by the others.
    """
    scores = {}
    for group in evidence.groups:
        units = torch.cat([w.flatten(1) for w in _filters(evidence, group)], dim=1)
        scores[group.name] = torch.cdist(units, units).fill_diagonal_(0).sum(1)
    return scores


def bn_scale(evidence: Evidence) -> Scores:
    """Sum of the absolute scales of the norms that carry a unit (Liu et al., ICCV 2017); `l2` where no norm does."""
    scores = l2(evidence)
    for group in evidence.groups:
        norms = [slot for slot in group.carriers if _is_scaled_norm(evidence.network, slot)]
        if norms:
            scores[group.name] = _total(
                _per_channel(weights_of(evidence.network.get_submodule(slot.module)).abs(), slot, group)
                for slot in norms
            )
    return scores


def taylor(evidence: Evidence) -> Scores:
    """(sum over a unit's weights and biases of w dL/dw)^2, averaged over batches of 32 images.

    First-order estimate of the squared change of the loss when the unit goes, taken jointly over the unit
    (Molchanov et al., CVPR 2019, the importance of a structural parameter as the square of the summed products).
    """
    scores = {group.name: torch.zeros(group.channels) for group in evidence.groups}
    for share, _, products in _products(evidence):
        for group in evidence.groups:
            change = _total(_summed(products, evidence.network, slot, group) for slot in group.producers)
            scores[group.name] += share * change.square()
    return scores


def obd(evidence: Evidence) -> Scores:
    """Sum over a unit's weights and biases of w^2 H / 2, H the diagonal of the Hessian (LeCun et al., NeurIPS 1989).

    H is estimated by the Fisher information: with the gradients g of B images independent and without mean, as they
    are where training has converged, it is B times the mean square of a batch's gradient.
    """
    scores = {group.name: torch.zeros(group.channels) for group in evidence.groups}
    for share, images, products in _products(evidence):
        squares = {key: images / 2 * product.square() for key, product in products.items()}
        for group in evidence.groups:
            scores[group.name] += share * sum(_summed(squares, evidence.network, s, group) for s in group.producers)
    return scores


def activation(evidence: Evidence) -> Scores:
    """Mean absolute value, over images and positions, of what the consumers read."""
    return {name: value.mean(0) for name, value in pooled(evidence.network, evidence.groups, evidence.batch[0]).items()}


def apoz(evidence: Evidence) -> Scores:
    """Share of images and positions at which what the consumers read is not zero: 1 - APoZ (Hu et al. 2016)."""

    def active(x: Tensor, module: nn.Module) -> Tensor:
        return channels_last(x, module).ne(0).float()

    levels = pooled(evidence.network, evidence.groups, evidence.batch[0], level=active)
    return {name: value.mean(0) for name, value in levels.items()}


def hrank(evidence: Evidence) -> Scores:
    """Mean rank of a channel's map as its consumers read it (Lin et al., CVPR 2020), over 50 images.

    What is no map (a flattened one, a vector) has rank 1 where it is not zero.
    """

    def rank(x: Tensor, module: nn.Module) -> Tensor:
        if isinstance(module, nn.Linear) or x.dim() < 4:
            return channels_last(x, module).ne(0).float()
        return torch.linalg.matrix_rank(x.float().flatten(2, -2), rtol=RANK_TOLERANCE).float()[:, None]

    levels = pooled(evidence.network, evidence.groups, evidence.batch[0][:RANK_IMAGES], level=rank)
    return {name: value.mean(0) for name, value in levels.items()}


def pfp(evidence: Evidence, *, shares: Shares = summed) -> Scores:
    """Largest share of a channel in any pre-activation of its consumers (Liebenwein et al., ICLR 2020).

    On as many of the images as the paper's bound asks for; see `prune_env.pruning.sensitivity`.
    """
    network, images = evidence.network, evidence.batch[0]
    return sensitivities(network, evidence.groups, images[: sample_size(network, images[:1])], shares=shares)


def second_order(evidence: Evidence) -> Scores:
    """Error of the consumers' outputs when a unit has gone after all weaker ones; see `Moments.second_order`.

    A group none of whose consumers has moments is scored by `l2`.
    """
    moments = evidence.moments or collect(evidence.network, evidence.groups, evidence.batch[0])
    scores = l2(evidence)
    scores.update({g.name: moments.second_order(evidence.network, g) for g in evidence.groups if moments.covers(g)})
    return scores


def random(evidence: Evidence) -> Scores:
    """A number in [0, 1) drawn from the seed and the unit's largest weights, so that it moves with the channel."""
    scores = {}
    for group in evidence.groups:
        units = torch.cat([w.flatten(1) for w in _filters(evidence, group)], dim=1)
        largest = units.topk(min(32, units.shape[1])).values.numpy()
        seeds = [(evidence.seed, zlib.crc32(unit.tobytes())) for unit in largest]
        scores[group.name] = torch.tensor([np.random.default_rng(seed).random() for seed in seeds]).float()
    return scores


def by_torch_pruning(evidence: Evidence, *, name: str) -> Scores:
    """One of Torch-Pruning's own, as that library computes it; `l2` where it has none.

    A group is scored at its first producer: the library adds up all layers that are coupled with it by itself.
    """
    firsts = {group.name: group.producers[0] for group in evidence.groups}
    layers = sorted({slot.module for slot in firsts.values()})
    found, scores = torch_pruning_scores(name, evidence.network, layers, evidence.batch), l2(evidence)
    for group in evidence.groups:
        values = found[firsts[group.name].module]
        if values is not None:
            scores[group.name] = _per_channel(values, firsts[group.name], group)
    return scores


IMPORTANCES: Mapping[str, Criterion] = MappingProxyType(
    {
        "l1": Criterion(l1),
        "l2": Criterion(l2),
        "l1_inputs": Criterion(l1_inputs),
        "lamp": Criterion(lamp),
        "geometric_median": Criterion(geometric_median),
        "bn_scale": Criterion(bn_scale),
        "taylor": Criterion(taylor),
        "obd": Criterion(obd),
        "activation": Criterion(activation),
        "apoz": Criterion(apoz),
        "hrank": Criterion(hrank),
        "pfp": Criterion(pfp),
        "pfp_max": Criterion(partial(pfp, shares=largest)),
        "second_order": Criterion(second_order),
        "random": Criterion(random),
        **{f"tp_{name}": Criterion(partial(by_torch_pruning, name=name)) for name in TORCH_PRUNING},
    }
)


def _filters(evidence: Evidence, group: Group) -> list[Float[Tensor, "channel filter weight"]]:
    """Weights of each producer by unit, on the CPU; where units differ in size, the missing filters are zero."""
    normed = any(_is_scaled_norm(evidence.network, slot) for slot in group.carriers)
    return [
        _stacked(_rows(evidence.network.get_submodule(slot.module), normed).float().cpu(), slot, group.channels)
        for slot in group.producers
    ]


def _rows(module: nn.Module, normed: bool) -> Float[Tensor, "position weight"]:
    """Weights of each output; a linear layer's bias is one more, unless a norm undoes it (Kim et al., NeurIPS 2020)."""
    weight = oriented(module).flatten(1)
    if normed or not isinstance(module, nn.Linear) or module.bias is None:
        return weight
    return torch.cat([weight, module.bias.detach()[:, None]], dim=1)


def _stacked(rows: Float[Tensor, "position weight"], slot: Slot, channels: int) -> Tensor:
    order = np.argsort(slot.unit, kind="stable")
    unit = slot.unit[order]
    sizes = np.bincount(unit, minlength=channels)
    within = np.arange(len(unit)) - (np.cumsum(sizes) - sizes)[unit]
    stacked = torch.zeros(channels, int(sizes.max()), rows.shape[1])
    stacked[torch.from_numpy(unit), torch.from_numpy(within)] = rows[torch.from_numpy(slot.index[order])]
    return stacked


def _per_channel(values: Float[Tensor, " position"], slot: Slot, group: Group) -> Float[Tensor, " channel"]:
    """Sum of an axis' values over the positions of each channel, on the CPU."""
    selected = values.detach().float().cpu()[torch.from_numpy(slot.index)]
    return torch.zeros(group.channels).index_add_(0, torch.from_numpy(slot.unit), selected)


def _is_scaled_norm(network: nn.Module, slot: Slot) -> bool:
    if slot.role != "both":
        return False
    module = network.get_submodule(slot.module)
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and not isinstance(module, nn.PReLU)


def _products(evidence: Evidence) -> Iterator[tuple[float, int, dict[int, Tensor]]]:
    """For each batch of 32 images: its share of the batches, its images, and w dL/dw by the id of each producer's w."""
    network, (images, labels) = evidence.network, evidence.batch
    producers = {slot.module for group in evidence.groups for slot in group.producers}
    tensors = [p for name in sorted(producers) for p in network.get_submodule(name).parameters(recurse=False)]
    batches = list(zip(images.split(TAYLOR_BATCH), labels.split(TAYLOR_BATCH), strict=True))
    with evaluating(network), _differentiable(tensors):
        for x, y in batches:
            loss = functional.cross_entropy(network(x).float(), y)
            slopes = torch.autograd.grad(loss, tensors, allow_unused=True)
            products = {id(t): t.detach() * g for t, g in zip(tensors, slopes, strict=True) if g is not None}
            yield 1 / len(batches), len(x), products


@contextmanager
def _differentiable(tensors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients with respect to some parameters, frozen or not."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _summed(products: Mapping[int, Tensor], network: nn.Module, slot: Slot, group: Group) -> Float[Tensor, " channel"]:
    """Sum over each unit of what is known of a producer's weight and bias."""
    module = network.get_submodule(slot.module)
    total = torch.zeros(group.channels)
    for name, axis in tensor_axes(module, slot.role):
        product = products.get(id(getattr(module, name)))
        if product is not None:
            total += _per_channel(product.movedim(axis, 0).reshape(product.shape[axis], -1).sum(1), slot, group)
    return total
