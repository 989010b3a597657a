"""Skipping by torch's own operations: inputs that share a choice go through one smaller convolution together.

For batches, for other devices and number formats, and where there is no compiler. Maps are whole here, zero where a
channel is not active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from prune_env.pruning.engine.anatomy import HOOKED, Anatomy, Session
from prune_env.pruning.gating.layer import GatedLayer, Producer

WORTH = 4_000_000
"""Multiply-accumulates that gathering weights costs as much as; a layer that would save less is computed whole."""

CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


def run_grouped(
    deployed: Anatomy, x: Float[Tensor, "sample ..."], *, worth: int = WORTH
) -> tuple[Tensor, Int64[Tensor, "sample layer"]]:
    """Outputs, and the active channels of each gated layer.

    Args:
        deployed: The network.
        x: Inputs.
        worth: Multiply-accumulates that a layer must save to be gathered.
    """
    run = _Run(deployed, Session(deployed, len(x)), worth)
    with torch.inference_mode(), HOOKED:
        # A copy: the network may begin with an operation that works in place.
        return run(x.clone()), run.session.counts


class _Run:
    """One forward pass with the gated layers, and the layers that read them, replaced by gathered ones."""

    def __init__(self, deployed: Anatomy, session: Session, worth: int) -> None:
        self.deployed, self.session, self.worth = deployed, session, worth
        self.readers: dict[str, list[tuple[int, tuple[np.ndarray, np.ndarray] | None]]] = {}
        for module, layer, index, unit in deployed.reads:
            places = None if index is None else (np.array(index), np.array(unit))
            self.readers.setdefault(module, []).append((layer, places))

    def __call__(self, x: Tensor) -> Tensor:
        network, undo = self.deployed.network, []
        try:
            for at, (name, layer) in enumerate(zip(self.deployed.names, self.deployed.layers, strict=True)):
                undo.append(_replaced(layer, lambda x, at=at, name=name, layer=layer: self._gate(at, name, layer, x)))
            for name in self.readers:
                module = network.get_submodule(name)
                if not isinstance(module, GatedLayer) and _gatherable(module):
                    undo.append(
                        _replaced(module, lambda x, name=name, module=module: self._compute(module, x, name, None))
                    )
            return network(x)
        finally:
            for give_back in undo:
                give_back()

    def _gate(self, at: int, name: str, layer: GatedLayer, x: Tensor) -> Tensor:
        x, pooled, runtime = layer.scores(x)
        static, active = self.session.turn(at, pooled, runtime)
        if not _gatherable(layer.producer):
            return layer.gated(x, runtime, static, active)
        y = layer.norm(self._compute(layer.producer, x, name, active))
        return layer.opened(y, runtime, static, active)

    def _compute(self, module: Producer, x: Tensor, name: str, active: Bool[Tensor, "sample output"] | None) -> Tensor:
        """The layer on active inputs and outputs only; outputs that are not active are zero."""
        inputs = self._inputs(name, len(x), module.weight.shape[1])
        choices = torch.cat([part for part in (inputs, active) if part is not None], dim=1)
        kinds, member = choices.unique(dim=0, return_inverse=True)
        result: Tensor | None = None
        for kind, row in enumerate(kinds):
            split = 0 if inputs is None else inputs.shape[1]
            read = None if inputs is None else row[:split].nonzero().flatten()
            write = None if active is None else row[split:].nonzero().flatten()
            rows = None if len(kinds) == 1 else (member == kind).nonzero().flatten()
            part = self._gathered(module, x if rows is None else x[rows], read, write)
            if rows is None:
                return part
            if result is None:
                result = part.new_zeros((len(x), *part.shape[1:]))
            result[rows] = part
        assert result is not None
        return result

    def _gathered(self, module: Producer, x: Tensor, read: Tensor | None, write: Tensor | None) -> Tensor:
        weight, bias, linear = module.weight, module.bias, isinstance(module, nn.Linear)
        operation = _operation(module)
        ins, outs = weight.shape[1] if read is None else len(read), len(weight) if write is None else len(write)
        axis = x.dim() - 1 if linear else 1
        area = x.select(axis, 0).numel() / _area_of_stride(module) * weight[0, 0].numel()
        if (weight.shape[0] * weight.shape[1] - ins * outs) * area < self.worth:
            y = operation(x, weight, bias)
            return y if write is None else _only(y, write, axis)
        if read is not None and ins < weight.shape[1]:
            x, weight = x.index_select(axis, read), weight.index_select(1, read)
        if write is None or outs == len(weight):
            return operation(x, weight, bias)
        y = operation(x, weight.index_select(0, write), None if bias is None else bias.index_select(0, write))
        shape = list(y.shape)
        shape[axis] = len(weight)
        return y.new_zeros(shape).index_copy_(axis, write, y)

    def _inputs(self, name: str, samples: int, width: int) -> Bool[Tensor, "sample input"] | None:
        """Which inputs of a layer are active; None where no gated layer writes any."""
        if name not in self.readers:
            return None
        open_ = torch.ones(samples, width, dtype=torch.bool, device=self.session.active[0].device)
        for layer, places in self.readers[name]:
            active = self.session.active[layer]
            if places is None:
                open_ &= active
            else:
                index, unit = places
                open_[:, torch.from_numpy(index)] &= active[:, torch.from_numpy(unit)]
        return open_


def _only(y: Tensor, write: Tensor, axis: int) -> Tensor:
    """The map with all other channels zero."""
    closed = torch.ones(y.shape[axis], dtype=torch.bool, device=y.device).index_fill_(0, write, False)
    return y.index_fill_(axis, closed.nonzero().flatten(), 0)


def _gatherable(module: nn.Module) -> TypeGuard[Producer]:
    if not isinstance(module, _ConvNd):
        return isinstance(module, nn.Linear)
    return type(module) in CONVOLUTIONS and module.groups == 1 and module.padding_mode == "zeros"


def _operation(module: Producer) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    if isinstance(module, nn.Linear):
        return functional.linear
    convolve = CONVOLUTIONS[type(module)]
    return lambda x, weight, bias: convolve(x, weight, bias, module.stride, module.padding, module.dilation)


def _area_of_stride(module: Producer) -> int:
    return 1 if isinstance(module, nn.Linear) else int(np.prod(module.stride))


def _replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Give a module another forward pass; call the answer to undo it."""
    module.__dict__["forward"] = forward
    return lambda: module.__dict__.pop("forward", None) and None
