"""Measurement of a deployed network: accuracy, what each input costs, what is stored, and how long one input takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from prune_env.number_format import autocast
from prune_env.pruning.engine.deployed import DeployedNetwork
from prune_env.pruning.gating.measurement import Habits, RuntimeMeasurement
from prune_env.pruning.measure import Latency, count_params, measure_latency


def measure_deployed(
    deployed: DeployedNetwork, batches: Iterable[tuple[Tensor, Tensor]], *, dtype: torch.dtype = torch.float32
) -> RuntimeMeasurement:
    """Run a split through a deployed network, by its masked computation: the engine's outputs, faster for a batch.

    Args:
        deployed: The network; predictors and policy count as its parameters.
        batches: Normalised images and their classes.
        dtype: Number format of the forward pass.
    """
    device = next(deployed.parameters()).device
    right, loss, habits = 0, 0.0, Habits(len(deployed.layers))
    with torch.inference_mode(), autocast(device, dtype):
        for inputs, labels in batches:
            prepared = inputs.to(device)
            if prepared.dim() == 4:
                prepared = prepared.contiguous(memory_format=torch.channels_last)
            logits, chosen = deployed.chosen(prepared)
            answer = labels.to(device)
            right += int((logits.argmax(1) == answer).sum())
            loss += float(functional.cross_entropy(logits.float(), answer, reduction="sum"))
            for at, active in enumerate(chosen):
                habits.note(at, active)
    together = torch.from_numpy(habits.counts)
    costs = deployed.costs
    return RuntimeMeasurement(
        accuracy=right / len(together),
        loss=loss / len(together),
        macs=deployed.macs(together).numpy(),
        params=count_params(deployed),
        dense_macs=int(costs.dense_macs),
        dense_params=int(costs.dense_params),
        varying=[count / choice.full for count, choice in zip(habits.varying, deployed.choices, strict=True)],
    )


def disagreement(deployed: DeployedNetwork, images: Tensor) -> tuple[float, float]:
    """How far the engine's outputs are from the masked ones, and for which share of inputs the choices differ.

    Args:
        deployed: The network.
        images: `[n, ...]` normalised inputs, run one by one.

    Returns:
        The largest difference of outputs over inputs with equal choices, relative to the largest output (at least
        one); and the share of inputs whose choices differ: scores that nearly tie may fall either way in floating
        point.
    """
    expected, counts = deployed.masked(images)
    found, active = zip(*(deployed.run(image) for image in images.split(1)), strict=True)
    same = (counts == torch.cat(active)).all(1)
    scale = expected.abs().max().clamp_min(1.0)
    far = ((expected - torch.cat(found)).abs().amax(1) / scale)[same]
    return float(far.max()) if len(far) else 0.0, 1 - float(same.float().mean())


def compare_latency(
    dense: nn.Module,
    deployed: nn.Module,
    images: Sequence[Tensor],
    *,
    threads: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, Latency]:
    """Batch-1 latency of the dense and the deployed network, in turns over the same images.

    Args:
        dense: The network that pruning began with.
        deployed: What came of it.
        images: Inputs with a batch axis of one; the median over them is reported, for the choices differ.
        threads: CPU threads.
        clock: As for `measure_latency`.
    """
    taken: dict[str, list[Latency]] = {"dense": [], "deployed": []}
    for image in images:
        for name, network in (("dense", dense), ("deployed", deployed)):
            taken[name].append(measure_latency(network, image, threads=threads, min_run_time=0.1, clock=clock))
    return {
        name: Latency(
            median(one.median_s for one in each),
            median(one.iqr_s for one in each),
            threads,
            1,
            each[0].dtype,
            each[0].device,
        )
        for name, each in taken.items()
    }
