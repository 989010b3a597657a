"""What an input costs in a deployed network: the accounting of the gated one, as tensors that can be stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from prune_env.pruning.gating.accounting import Accounting


class Costs(nn.Module):
    """Macs of an input as a closed form in its active channels: `constant + sum_t weight_t * first_t * second_t`.

    Args:
        forms: Accounting of the gated network before the static cut.
        kept: `[layers]` channels that are stored.

    Attributes:
        constant: `[layers + 1]` macs that no decision changes, with the predictors of the first layers only.
        weight: `[term]`.
        offset: `[2, term]` first and second factor without any channel of a gated layer.
        slope: `[2, layer, term]` their change per active channel.
        dense_macs: Of the dense network, without gates.
        dense_params: Likewise.
    """

    constant: Tensor
    weight: Tensor
    offset: Tensor
    slope: Tensor

    def __init__(self, forms: Accounting, kept: Int64[np.ndarray, " layer"]) -> None:
        super().__init__()
        cost, columns = forms.graph.cost["macs"], [forms.graph.position(name) for name in forms.names]
        rest = forms.graph.full.copy()
        rest[columns] = 0
        so_far = np.tril(np.ones((len(kept) + 1, len(kept)), dtype=np.int64), -1) * kept
        constant = cost.constant + np.array([float(forms.predictor_macs(row)) for row in so_far])
        for name, values in (
            ("constant", constant),
            ("weight", cost.weight),
            ("offset", cost.offset + np.einsum("fgt,g->ft", cost.slope, rest)),
            ("slope", cost.slope[:, columns]),
        ):
            self.register_buffer(name, torch.from_numpy(np.array(values, dtype=np.float64)))
        self.dense_macs, self.dense_params = forms.dense_macs, forms.dense_params

    def macs(self, active: Sequence[Int64[Tensor, " sample"]]) -> Float64[Tensor, "*sample"]:
        """Macs of each input, predictors counted; without any layer decided, one number for all.

        Args:
            active: Active channels of the first layers; layers that are not given count nothing.
        """
        at = len(active)
        if at == 0:
            first, second = self.offset
        else:
            counts = torch.stack(list(active), dim=1).double()
            first, second = (self.offset[n] + counts @ self.slope[n, :at] for n in (0, 1))
        return self.constant[at] + (first * second) @ self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Costs:
        """Counts stay in float64 whatever the network is moved to."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self.get_buffer(name).device)
        return self
