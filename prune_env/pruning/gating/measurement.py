"""Measurement of runtime pruning: accuracy, and what each input really costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from prune_env.number_format import autocast
from prune_env.pruning.gating.accounting import Accounting
from prune_env.pruning.gating.layer import Decide, Question
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.measure import evaluating

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, eq=False)
class RuntimeMeasurement:
    """What a gated network achieves on one split under some decisions, and what it costs.

    Attributes:
        accuracy: Share of images classified rightly, in [0, 1].
        loss: Mean cross-entropy, nats per image.
        macs: `[images]` dynamic macs of each image, predictors counted.
        params: Stored parameters, predictors and static scores counted (an agent is not known here).
        dense_macs: Of the network without gates.
        dense_params: Of the network without gates.
        varying: Per gated layer, the share of its channels that are active for some of the images and not for others.
    """

    accuracy: float
    loss: float
    macs: Float[np.ndarray, " image"]
    params: int
    dense_macs: int
    dense_params: int
    varying: Sequence[float] = ()

    @property
    def macs_share(self) -> float:
        """Mean dynamic macs as a share of the dense network's."""
        return float(self.macs.mean()) / self.dense_macs

    def row(self) -> dict[str, object]:
        """The measurement as JSON can hold it."""
        shares = np.percentile(self.macs, PERCENTILES) / self.dense_macs
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "dynamic_macs": float(self.macs.mean()),
            "dynamic_macs_share": self.macs_share,
            "dynamic_macs_spread": float(self.macs.std()) / self.dense_macs,
            "dynamic_macs_percentiles": {str(p): float(share) for p, share in zip(PERCENTILES, shares, strict=True)},
            "speed_up_macs": self.dense_macs / float(self.macs.mean()),
            "params": self.params,
            "params_share": self.params / self.dense_params,
            "varying_channels": [float(share) for share in self.varying],
        }


class Habits:
    """How often the channels of each layer are active.

    Args:
        layers: Gated layers of the network.
    """

    def __init__(self, layers: int) -> None:
        self._counts: list[list[np.ndarray]] = [[] for _ in range(layers)]
        self._often: list[Tensor] = [torch.tensor(0)] * layers

    def note(self, at: int, active: Bool[Tensor, "sample channel"]) -> None:
        """Take down the active channels of layer `at` for some images."""
        self._counts[at].append(active.sum(1).cpu().numpy())
        self._often[at] = self._often[at] + active.sum(0).cpu()

    @property
    def counts(self) -> Int64[np.ndarray, "image layer"]:
        """Active channels of each image."""
        return np.stack([np.concatenate(parts) for parts in self._counts], axis=1)

    @property
    def often(self) -> list[Int64[Tensor, " _"]]:
        """Per layer: for how many images each channel is active."""
        return list(self._often)

    @property
    def varying(self) -> list[int]:
        """Per layer: channels that are active for some images and not for others."""
        images = len(self.counts)
        return [int(((often > 0) & (often < images)).sum()) for often in self.often]


class Recorder(Habits):
    """Passes questions on to some decisions, and takes down what they answer.

    Args:
        decide: The decisions that are watched.
        layers: Gated layers of the network.
    """

    def __init__(self, decide: Decide, layers: int) -> None:
        super().__init__(layers)
        self.decide = decide

    def __call__(self, question: Question) -> Tensor:
        """The answer of the watched decisions."""
        active = self.decide(question)
        self.note(question.index, active)
        return active


def measure_runtime(
    gated: GatedNetwork,
    decide: Decide,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    kept: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
) -> RuntimeMeasurement:
    """Run a split through a gated network under some decisions.

    Args:
        gated: The network; its own decisions return afterwards.
        decide: Which channels are active.
        batches: Normalised images and their classes.
        kept: `[layers]` channels that are stored; None stores all of the network's.
        dtype: Number format of the forward pass.
    """
    forms, recorder = Accounting.of(gated), Recorder(decide, len(gated.names))
    stored = gated.full if kept is None else kept
    device = next(gated.parameters()).device
    right, loss, images, before = 0, 0.0, 0, gated.decide
    gated.decide = recorder
    try:
        with evaluating(gated), torch.inference_mode(), autocast(device, dtype):
            for inputs, labels in batches:
                prepared = inputs.to(device)
                if prepared.dim() == 4:
                    prepared = prepared.contiguous(memory_format=torch.channels_last)
                logits, answer = gated(prepared).float(), labels.to(device)
                right += int((logits.argmax(1) == answer).sum())
                loss += float(functional.cross_entropy(logits, answer, reduction="sum"))
                images += len(labels)
    finally:
        gated.decide = before
    return RuntimeMeasurement(
        accuracy=right / images,
        loss=loss / images,
        macs=forms.macs(recorder.counts, stored),
        params=int(forms.params(stored)),
        dense_macs=int(forms.dense_macs),
        dense_params=int(forms.dense_params),
        varying=[count / whole for count, whole in zip(recorder.varying, gated.full, strict=True)],
    )
