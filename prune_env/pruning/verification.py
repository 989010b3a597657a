"""Verification: a group is believed only after its masked and cut networks have computed the same, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from prune_env.pruning.coupling import LAYERS
from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut, dropped_axes, masked

SHARES = ((0.7, 1.0), (0.3, 0.7))
"""Ranges from which the checked plans draw their keep: a light cut leaves signals alive, a deep one breaks shapes."""

TOLERANCE = 1e-3
"""Allowed difference relative to the largest output of the same layer: a wrong index is off by about one, and float32
(TF32 on a GPU) stays well below."""


class Check:
    """Compares masked and cut networks on one random input.

    Every convolution and linear layer is compared, not only the network's output: a deep random network may answer
    to a wrong cut by nothing at all, since dead activations hide it.
    """

    def __init__(self, network: nn.Module, graph: LayerGraph, example: torch.Tensor) -> None:
        """Bind the check.

        Args:
            network: The network in float32 and eval mode.
            graph: Its graph before verification.
            example: Gives the input's shape and device; whole-number inputs are used as they are.
        """
        self.network = network
        self.graph = graph
        self._generator = np.random.default_rng(0)
        noise = torch.from_numpy(self._generator.standard_normal(tuple(example.shape)))
        self.sample = noise.to(example) if example.is_floating_point() else example

    def failures(self, groups: Sequence[Group]) -> dict[str, str]:
        """Groups whose cut is wrong, with the reason; found by halving, as most networks pass in one piece."""
        reason = self.disagreement(groups) if groups else None
        if reason is None:
            return {}
        if len(groups) == 1:
            return {groups[0].name: reason}
        middle = len(groups) // 2
        return self.failures(groups[:middle]) | self.failures(groups[middle:])

    def disagreement(self, groups: Sequence[Group]) -> str | None:
        """How masked and cut differ for random plans over some groups, or None if they agree."""
        for low, high in SHARES:
            keep = {}
            for group in groups:
                least, most = max(1, int(low * group.channels)), max(1, int(np.ceil(high * group.channels)) - 1)
                count = int(self._generator.integers(least, max(least, most) + 1))
                keep[group.name] = tuple(self._generator.permutation(group.channels)[:count].tolist())
            reason = self._difference(Plan(keep))
            if reason:
                return reason
        return None

    def _difference(self, plan: Plan) -> str | None:
        try:
            with masked(self.network, self.graph, plan):
                expected = _outputs(self.network, self.sample)
            small = cut(self.network, self.graph, plan)
            found = _outputs(small, self.sample)
            macs = count_macs(small, self.sample)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return f"cutting its channels breaks the forward pass: {first[:120]}"
        dropped = {name: axis[1] for (name, role), axis in dropped_axes(self.graph, plan).items() if role != "in"}
        for name, tensors in expected.items():
            for whole, part in zip(tensors, found[name], strict=True):
                if not _agree(_without(whole, dropped.get(name), self.network, name), part):
                    return (
                        f"masked and cut differ at {name or 'the output'}: its channels are mixed, normalised "
                        "together or reordered on the way"
                    )
        if macs != self.graph.macs(plan) or count_params(small) != self.graph.params(plan):
            return "the cost of the cut network does not follow its channel counts"
        return None


def _keep(
    outputs: dict[str, list[torch.Tensor]], name: str, _: nn.Module, __: tuple[Any, ...], output: torch.Tensor
) -> None:
    outputs.setdefault(name, []).append(output)


def _outputs(network: nn.Module, sample: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Outputs of every convolution and linear layer, call by call, and under `""` those of the network."""
    outputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(partial(_keep, outputs, name))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS) and name
    ]
    try:
        with torch.no_grad():
            final = network(sample)
    finally:
        for handle in handles:
            handle.remove()
    outputs[""] = [leaf for leaf in tree_leaves(final) if isinstance(leaf, torch.Tensor)]
    return outputs


def _without(output: torch.Tensor, dropped: np.ndarray | None, network: nn.Module, name: str) -> torch.Tensor:
    """A layer's output in the masked network without the channels that the cut one does not have."""
    if dropped is None:
        return output
    axis = -1 if isinstance(network.get_submodule(name), nn.Linear) else 1
    keep = np.ones(output.shape[axis], dtype=bool)
    keep[dropped] = False
    return output.index_select(axis % output.dim(), torch.from_numpy(np.flatnonzero(keep)).to(output.device))


def _agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not expected.numel() or not expected.is_floating_point():
        return bool(torch.equal(expected, found))
    return bool((expected - found).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1e-30))
