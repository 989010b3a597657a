"""Torch-Pruning's importances, each at its own defaults: reduced by the mean over coupled layers, then over channels.

What the library does is taken as it is. Of version 1.6: `GroupHessianImportance.accumulate_grad` looks parameters up by
name but stores them by object, so that of several images only the last one counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch_pruning import DependencyGraph, importance

from prune_env.pruning.coupling import dependencies

TORCH_PRUNING: Mapping[str, Callable[[], importance.Importance]] = MappingProxyType(
    {
        "magnitude": importance.GroupMagnitudeImportance,
        "lamp": importance.LAMPImportance,
        "fpgm": importance.FPGMImportance,
        "taylor": importance.GroupTaylorImportance,
        "hessian": importance.GroupHessianImportance,
    }
)
"""Name -> importance."""

CHUNK = 32
"""Images per backward pass of the gradient that `taylor` reads."""
HESSIAN_IMAGES = 32
"""Images that `hessian` squares the gradients of: each is a backward pass of its own."""


def torch_pruning_scores(
    name: str, network: nn.Module, layers: Sequence[str], batch: tuple[Tensor, Tensor]
) -> dict[str, Float[Tensor, " channel"] | None]:
    """Importance of each output channel of some layers, all that is coupled with it included.

    Args:
        name: An entry of `TORCH_PRUNING`.
        network: The dense network; a copy is asked.
        layers: Names of convolution and linear layers.
        batch: Normalised images and labels; only `taylor` and `hessian` read labels.

    Returns:
        Layer -> float32 on the CPU, higher = keep; None where the library gives no importance.

    Raises:
        ValueError: Torch-Pruning fails on the network (grouped convolutions that widen, say).
    """
    private = copy.deepcopy(network).eval()
    for parameter in private.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    measure = TORCH_PRUNING[name]()
    _add_gradients(measure, private, batch)
    try:
        graph = dependencies(private, (batch[0][:1],))
        return {layer: _of(measure, graph, private.get_submodule(layer)) for layer in layers}
    except Exception as error:  # the library has no error class of its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"importance 'tp_{name}' is Torch-Pruning's, which fails on this network: {reason}") from None


def _add_gradients(measure: importance.Importance, network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Leave in the network, or in the importance, the gradients that it reads."""
    images, labels = batch
    with torch.enable_grad():
        if isinstance(measure, importance.GroupTaylorImportance):
            for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
                (functional.cross_entropy(network(x), y, reduction="sum") / len(images)).backward()
        elif isinstance(measure, importance.GroupHessianImportance):
            for x, y in zip(images[:HESSIAN_IMAGES].split(1), labels[:HESSIAN_IMAGES].split(1), strict=True):
                network.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                measure.accumulate_grad(network)


def _of(measure: importance.Importance, graph: DependencyGraph, layer: nn.Module) -> Float[Tensor, " channel"] | None:
    pruner = graph.get_pruner_of_module(layer)
    assert pruner is not None, "Torch-Pruning has one for every convolution and linear layer"
    group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))
    found = measure(group)
    # A group of zeros divided by its mean is not a number.
    return None if found is None else found.detach().float().cpu().nan_to_num(0.0)
