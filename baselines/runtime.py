"""Runtime pruning without agents: the same share in every layer, one training budget for all methods.

Feature boosting and suppression (FBS): Gao, Zhao, Dudziak, Mullins, Xu, "Dynamic Channel Pruning: Feature Boosting and
Suppression", ICLR 2019 (https://arxiv.org/abs/1810.05331); constants also from the authors' code,
https://github.com/deep-fry/mayo. With s the pooled input of a layer, C its channels and d the density:

    g = relu(Phi s + rho)                                     the gates take the place of the BatchNorm's scale
    pi = the d C largest of g, zero elsewhere                 winner takes all; no gradient through the choice
    out = relu(pi * norm(conv(x)) + mask * beta)
    loss = cross-entropy + lambda sum over layers of E ||g||_1,  lambda = 1e-8

trained at density 1 first, then at densities that fall gradually to d.

Where we deviate from FBS:

- `rho` starts at the BatchNorm's scale and `Phi` at zero, so that training starts from the dense network; the authors
  start at 1 and at small random numbers. `beta` starts at the BatchNorm's shift (their code: .1).
- `s` is the plain average of the input: its L1 mean behind a rectifier, but not at the image.
- The number of winners is d C rounded to the nearest, as for the other methods here, not upwards.
- Only layers that can carry a gate have one: in a residual network those inside the blocks.
- One one-cycle SGD run for all densities, whose lowest one has the last half of the epochs; the authors fine-tune
  density by density until each has converged.
- A channel whose gate was rectified to zero may still win, and then shows its shift; it is counted as computed.

Published for M-CifarNet on CIFAR-10: 91.37 -> 90.54 % at d = .5, 3x fewer macs (the authors' README); 89.88 % at 3.93x
(as run again by Chen et al., NeurIPS 2020).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prune_env.checks import check_name
from prune_env.gates import attached, deciding, gate_settings, gates_hook
from prune_env.number_format import format_named
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.layer import RectifiedLinear
from prune_env.pruning.gating.measurement import RuntimeMeasurement, measure_runtime
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.gating.stored import static_decisions
from prune_env.pruning.gating.tradeoff import check_trust
from prune_env.pruning.measure import Budget
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task
from prune_env.tasks.training import Hook, TrainingState, TrainReport, TrainSettings, train
from prune_env.tasks.training.loop import Progress

LASSO = 1e-8
"""Weight of the gates' L1 norm in FBS."""

CALIBRATION = 128
"""Training images on which the mean macs of a share are measured."""

HALVINGS = 12
"""Steps of the search for the share of a budget."""

LEAST = 1e-6
"""A share that leaves one channel in any layer."""

BATCH = 128


def rectified(task: Task) -> GatedNetwork:
    """The same with the gates of FBS."""
    gated = attached(task)
    for layer in gated.layers:
        layer.gate = RectifiedLinear.of(layer.gate)
    return gated


def lasso(gates: Sequence[Tensor]) -> Float[Tensor, " "]:
    """FBS's regulariser: the expected L1 norm of each layer's gates `[sample, channel]`, summed over layers."""
    return LASSO * torch.stack([gate.abs().sum(1).mean() for gate in gates]).sum()


@dataclass(frozen=True)
class RuntimeMethod:
    """A way to prune at run time without agents.

    Attributes:
        name: Its name in `RUNTIME_METHODS`.
        paper: Where it comes from, one line.
        prepare: Task -> its network with gates, before they are trained.
        trust: Trust R in the runtime decision: 1 is runtime pruning alone, 0 static pruning alone. Static scores are
            trained below 1, and stay at one, where they do nothing, at 1.
        penalty: Gates of all layers, each `[sample, channel]` -> what is added to the loss.
    """

    name: str
    paper: str
    prepare: Callable[[Task], GatedNetwork] = field(default=attached)
    trust: float | int = 1.0
    penalty: Callable[[Sequence[Tensor]], Tensor] | None = None


CHEN = "Chen, Chen, Pan, Storage Efficient and Dynamic Flexible Runtime Channel Pruning, NeurIPS 2020"

RUNTIME_METHODS: dict[str, RuntimeMethod] = {
    "fbs": RuntimeMethod(
        "fbs", "Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019", rectified, 1.0, lasso
    ),
    "runtime_uniform": RuntimeMethod("runtime_uniform", f"{CHEN}: its gates, without agents"),
    "static_uniform": RuntimeMethod("static_uniform", f"{CHEN}: its static scores, without agents", trust=0.0),
}
"""Runtime baselines by name."""


@dataclass(frozen=True, eq=False)
class RuntimeResult:
    """A trained gated network under uniform decisions, and what it is worth.

    Attributes:
        method: Name of the method.
        keep: The share in every layer.
        trust: Trust R in the runtime decision.
        gated: The trained network, in eval mode.
        decide: Its decisions.
        kept: `[layers]` channels that are stored.
        training: Loss and accuracy of each epoch.
        search: Measured on the search split; parameters count what is stored.
    """

    method: str
    keep: float
    trust: float
    gated: GatedNetwork = field(repr=False)
    decide: FixedDecisions = field(repr=False)
    kept: Int64[np.ndarray, " layer"]
    training: TrainReport = field(repr=False)
    search: RuntimeMeasurement
    _measure: Callable[[Split], RuntimeMeasurement] = field(repr=False)
    _test: Split = field(repr=False)

    @cached_property
    def test(self) -> RuntimeMeasurement:
        """Measured on the test split: read on first access, once."""
        return self._measure(self._test)


def runtime_method_of(name: str | RuntimeMethod) -> RuntimeMethod:
    """The runtime method of that name; a `RuntimeMethod` of your own is handed back.

    Raises:
        ValueError: There is none; names the closest.
    """
    if isinstance(name, RuntimeMethod):
        return name
    check_name("runtime method", name, RUNTIME_METHODS)
    return RUNTIME_METHODS[name]


def run_runtime(
    method: str | RuntimeMethod,
    task: Task,
    *,
    epochs: int,
    keep: float | int | None = None,
    budget: float | int | None = None,
    seed: int = 0,
    trust: float | int | None = None,
    progress: Progress | None = None,
    folder: Path | str | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
) -> RuntimeResult:
    """Train a task's gated network at falling shares, and measure it at the last one.

    Args:
        method: A name in `RUNTIME_METHODS`, or a `RuntimeMethod` of your own.
        task: From `prune_env.make_task`. It is left as it is.
        epochs: Passes over the training split, the whole training budget.
        keep: The share in every layer, in (0, 1].
        budget: In place of keep: share of the dense macs in (0, 1], or a number of macs, that training images may cost
            in the mean. The largest share that meets it is found by measuring, predictors counted.
        seed: Seed of order and augmentation.
        trust: Trust R in the runtime decision; None takes the method's own.
        progress: Told about every step.
        folder: Where a checkpoint is written after every epoch; the same call goes on from the one it finds.
        threads: CPU threads of the training; None takes the task's usual number.
        device: Where to train.

    Raises:
        ValueError: An unknown name, a budget below the reachable minimum, both or none of keep and budget, or any
            other value that is not allowed.
        TrainingDiverged: The loss became NaN or Inf.
    """
    chosen, settings = runtime_method_of(method), gate_settings(task, epochs=epochs, seed=seed)
    settings = settings if threads is None else dataclasses.replace(settings, threads=threads)
    _check_aim(keep, budget)
    trust = check_trust(chosen.trust if trust is None else trust)
    gated = chosen.prepare(task).to(device).eval()
    if trust < 1:
        gated.share_scales()
    sample = [task.calibration(CALIBRATION)]

    def measure(batches: Iterable[tuple[Tensor, Tensor]], decide: FixedDecisions) -> RuntimeMeasurement:
        dtype = format_named(settings.dtype, device)
        return measure_runtime(gated, decide, batches, kept=stored(gated, decide), dtype=dtype)

    def share() -> float:
        if budget is None:
            assert keep is not None, "one of the two is given"
            return float(keep)
        return share_of(gated, budget, lambda keep: float(measure(sample, uniform(gated, keep, trust)).macs.mean()))

    aim = share()
    checkpoint = None
    if folder is not None:
        checkpoint = Path(folder) / f"{chosen.name}-keep{aim:.6g}-trust{trust:g}-seed{seed}.safetensors"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    training = train_uniform(
        gated,
        task,
        settings,
        method=chosen,
        keep=aim,
        trust=trust,
        progress=progress,
        checkpoint=checkpoint,
        device=device,
    )
    # With some trust in either decision, how far the two overlap is known only now.
    final = share()
    decide = uniform(gated, final, trust)

    def measured(split: Split) -> RuntimeMeasurement:
        return measure(split.batches(BATCH), decide)

    return RuntimeResult(
        method=chosen.name,
        keep=final,
        trust=trust,
        gated=gated,
        decide=decide,
        kept=stored(gated, decide),
        training=training,
        search=measured(task.search),
        _measure=measured,
        _test=task.test,
    )


def train_uniform(
    gated: GatedNetwork,
    task: Task,
    settings: TrainSettings,
    *,
    method: RuntimeMethod,
    keep: float,
    trust: float,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device = "cpu",
) -> TrainReport:
    """Train network, gates and, where they have a say, static scores at shares that fall from 1 to `keep`.

    Args:
        gated: Trained in place; in eval mode afterwards.
        task: Its training split.
        settings: Epochs, learning rate and so on.
        method: Its penalty is added to the loss.
        keep: The share of the last epochs.
        trust: Trust R in the runtime decision.
        progress: Told about every step.
        checkpoint: File to write after each epoch, and to go on from.
        device: Where to train.

    Raises:
        TrainingDiverged: The loss became NaN or Inf; the last good state is kept.
    """
    shares, penalty = falling(keep, settings.epochs), method.penalty
    gated.static.requires_grad_(trust < 1)
    try:
        with deciding(gated, None), observed(gated) as gates:

            def lower(state: TrainingState) -> None:
                gated.decide = uniform(gated, shares[state.epoch], trust)

            hook = Hook(
                before_step=lower, penalty=None if penalty is None else lambda state: penalty(list(gates.values()))
            )
            return train(
                gated,
                task.train,
                settings=settings,
                hooks=(hook, gates_hook(gated, settings)),
                progress=progress,
                checkpoint=checkpoint,
                device=device,
            )
    finally:
        gated.static.requires_grad_(True)
        gated.to(memory_format=torch.channels_last)


def uniform(gated: GatedNetwork, keep: float, trust: float | int) -> FixedDecisions:
    """The same runtime and static share in every layer."""
    shares = (keep,) * len(gated.names)
    return FixedDecisions(shares, shares, trust=trust)


def stored(gated: GatedNetwork, decide: FixedDecisions) -> Int64[np.ndarray, " layer"]:
    """Channels of each layer that some input may use under these decisions; the others can be cut for good."""
    decisions = static_decisions(gated, decide.static_keeps, decide.trust)
    return np.array([len(decision.kept) for decision in decisions], dtype=np.int64)


def falling(keep: float, epochs: int) -> tuple[float, ...]:
    """The share of each epoch: from 1 down to `keep` in equal steps over the first half, `keep` in the second."""
    steps = epochs // 2
    return tuple(1 - (1 - keep) * (min(1.0, epoch / steps) if steps else 1.0) for epoch in range(epochs))


def share_of(gated: GatedNetwork, budget: float | int, macs: Callable[[float], float]) -> float:
    """The largest share whose mean macs meet a budget, to `2 ** -HALVINGS`.

    Args:
        gated: The network.
        budget: Share of the dense macs in (0, 1], or a number of macs.
        macs: Share -> mean macs that it costs.

    Raises:
        ValueError: Not a budget, or not even one channel in each layer meets it.
    """
    graph = gated.graph
    dense = float(graph.cost["macs"](graph.full))
    limit = Budget.of(budget, resource="macs", dense=dense, minimum=math.ceil(macs(LEAST))).limit
    low, high = LEAST, 1.0
    if macs(high) <= limit:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= limit else (low, middle)
    return low


@contextmanager
def observed(gated: GatedNetwork) -> Iterator[dict[int, Tensor]]:
    """Layer -> gates `[sample, channel]` of the latest forward pass, with gradients."""
    seen: dict[int, Tensor] = {}
    handles = [
        layer.gate.register_forward_hook(lambda _, inputs, gates, at=at: seen.update({at: gates}))
        for at, layer in enumerate(gated.layers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_aim(keep: float | int | None, budget: float | int | None) -> None:
    """Refuse anything but one of keep and budget; the search for a share checks the budget itself."""
    if (keep is None) == (budget is None):
        raise ValueError(f"exactly one of keep and budget is needed; got keep={keep!r} and budget={budget!r}")
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if keep is not None and not (number and 0 < keep <= 1):
        raise ValueError(f"keep is {keep!r}; a share of the channels in (0, 1] is allowed")
