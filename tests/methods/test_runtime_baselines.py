"""Runtime baselines: FBS by hand, the shares of a training, what results count, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prune_env
from baselines import METHODS, runtime
from baselines.runtime import (
    RUNTIME_METHODS,
    RectifiedLinear,
    RuntimeMethod,
    RuntimeResult,
    attached,
    falling,
    lasso,
    observed,
    rectified,
    run_runtime,
    share_of,
    stored,
    uniform,
)
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.layer import GatedLayer, Question
from prune_env.pruning.gating.network import GatedNetwork
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from prune_env.tasks.task import Task
from prune_env.tasks.training import TrainingDiverged, TrainReport
from tests.env.small_networks import example
from tests.methods.own_tasks import own_task

KEEP = 0.5


@pytest.fixture(scope="module")
def task() -> Task:
    """Digits, barely trained."""
    return prune_env.make_task("digits-cnn", epochs=6)


@pytest.fixture(scope="module")
def tiny(task: Task) -> Task:
    """The same with three steps an epoch."""
    return dataclasses.replace(
        task, train=dataclasses.replace(task.train, indices=task.train.indices[:192], labels=task.train.labels[:192])
    )


@pytest.fixture(scope="module")
def results(task: Task) -> dict[str, RuntimeResult]:
    """Every method, trained for two epochs."""
    return {name: run_runtime(name, task, keep=KEEP, epochs=2) for name in RUNTIME_METHODS}


# FBS


def fbs_layer() -> GatedLayer:
    """Two inputs, four outputs: input 0, input 1, their sum, their difference."""
    convolution, norm = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4, eps=0.0)
    layer = GatedLayer(convolution, norm).eval()
    layer.gate = RectifiedLinear.of(layer.gate)
    layer.gain, layer.sight.eps = 1.0, 0.0
    with torch.no_grad():
        layer.producer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])[:, :, None, None])
        layer.gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.5, 0.5]]))
        layer.gate.bias.copy_(torch.tensor([0.0, 0.25, 1.0, 0.0]))
        layer.shift.copy_(torch.tensor([0.5, -1.0, 0.75, -1.0]))
    return layer


def boosted(layer: GatedLayer, x: torch.Tensor, density: float) -> torch.Tensor:
    """The layer's output and the rectifier behind it, with the winners of a density."""
    _, pooled, gates = layer.scores(x)
    ones = torch.ones(4)
    decide = FixedDecisions((density,), (1.0,))
    return layer.gated(x, gates, ones, decide(Question("", 0, pooled, gates.detach(), ones))).relu()


def test_boosting_and_suppression_by_hand() -> None:
    # s = (2, 1), so Phi s + rho = (2, 1.25, -1, 1.5) and g = (2, 1.25, 0, 1.5): at d = .5 channels 0 and 3 win.
    # Channel 0: relu(2 * (1, 3) + .5). Channel 3: the difference is (1, 1), relu(1.5 * (1, 1) - 1).
    layer, x = fbs_layer(), torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])
    _, pooled, gates = layer.scores(x)
    assert pooled.tolist() == [[2.0, 1.0]]
    assert gates.tolist() == [[2.0, 1.25, 0.0, 1.5]]
    out = boosted(layer, x, 0.5)
    assert out[0, :, 0].tolist() == [[2.5, 6.5], [0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    # No gradient through the choice: only winners learn, each by its own map. The shift is masked, too.
    out.sum().backward()
    assert layer.gate.bias.grad.tolist() == [4.0, 0.0, 0.0, 2.0]
    assert layer.gate.weight.grad.tolist() == [[8.0, 4.0], [0.0, 0.0], [0.0, 0.0], [4.0, 2.0]]
    assert layer.shift.grad.tolist() == [2.0, 0.0, 0.0, 2.0]
    # Another image has other winners: s = (0, 3), g = (0, 3.25, 1, 1.5).
    other = boosted(layer, torch.tensor([[[[0.0, 0.0]], [[2.0, 4.0]]]]), 0.5)
    assert other[0, :, 0].tolist() == [[0.0, 0.0], [5.5, 12.0], [0.0, 0.0], [0.0, 0.0]]
    # At density 1 nothing is suppressed but what its gate does not boost: there, the shift is left.
    assert boosted(layer, x, 1.0)[0, 2, 0].tolist() == [0.75, 0.75]


def test_the_lasso_by_hand() -> None:
    gates = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[4.0], [0.0]])]
    assert lasso(gates).item() == pytest.approx(1e-8 * (3 + 2))


@pytest.mark.parametrize("name", ["chain", "residual", "attention"])
def test_the_gates_of_fbs_start_as_the_dense_network_and_can_be_cut(name: str) -> None:
    own = own_task(name)
    gated, x = rectified(own), example(4)
    assert all(type(layer.gate) is RectifiedLinear for layer in gated.layers)
    with torch.no_grad():
        torch.testing.assert_close(gated(x), own.network(x), rtol=1e-4, atol=1e-5)
        for layer in gated.layers:
            layer.gate.weight.normal_()
            layer.gate.bias.normal_()
        with observed(gated) as gates:
            gated(x)
        assert len(gates) == len(gated.names)
        assert min(float(values.min()) for values in gates.values()) == 0
        plan = Plan({key: range(0, channels, 2) for key, channels in zip(gated.names, gated.full, strict=True)})
        small = gated.cut(plan)
        closed = {key: torch.arange(channels) % 2 == 0 for key, channels in zip(gated.names, gated.full, strict=True)}
        gated.decide = lambda question: closed[question.name].expand_as(question.runtime)
        torch.testing.assert_close(small(x), gated(x), rtol=1e-4, atol=1e-5)
        assert all(type(layer.gate) is RectifiedLinear for layer in copy.deepcopy(small).layers)
    assert not any(layer.gate._forward_hooks for layer in gated.layers)


# The training budget


def test_shares_fall_in_equal_steps_over_the_first_half_and_then_stay() -> None:
    assert falling(0.4, 1) == (0.4,)
    assert falling(0.4, 2) == (1.0, 0.4)
    assert falling(0.4, 3) == (1.0, 0.4, 0.4)
    assert falling(0.4, 6) == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.4, 0.4))
    assert falling(1.0, 4) == (1.0,) * 4


def test_training_goes_through_these_shares(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def spy(gated: Any, keep: float, trust: float) -> FixedDecisions:
        given.append(keep)
        return uniform(gated, keep, trust)

    monkeypatch.setattr(runtime, "uniform", spy)
    steps: list[int] = []
    run_runtime("fbs", tiny, keep=0.4, epochs=4, progress=lambda done, total, what: steps.append(total))
    per_epoch = len(steps) // 4
    assert given == pytest.approx([share for share in (1, 0.7, 0.4, 0.4) for _ in range(per_epoch)] + [0.4])


def test_a_penalty_reaches_the_gates(tiny: Task) -> None:
    def heavy(gates: list[torch.Tensor]) -> torch.Tensor:
        return 1.0 * torch.stack([gate.abs().sum(1).mean() for gate in gates]).sum()

    sizes = {}
    for penalty in (None, heavy):
        own = RuntimeMethod("own", "-", rectified, penalty=penalty)
        gated = run_runtime(own, tiny, keep=KEEP, epochs=1).gated
        sizes[penalty] = sum(float(layer.gate.bias.detach().abs().sum()) for layer in gated.layers)
    assert sizes[heavy] < sizes[None] - 0.1  # Adam's steps are small whatever the gradient


def test_the_same_seed_gives_the_same_result_whether_interrupted_or_not(tiny: Task, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"keep": KEEP, "epochs": 2, "trust": 0.5, "seed": 3}
    whole = run_runtime("runtime_uniform", tiny, **options)
    with pytest.raises(KeyboardInterrupt):
        run_runtime("runtime_uniform", tiny, **options, progress=stop, folder=tmp_path / "runs")
    (checkpoint,) = (tmp_path / "runs").iterdir()
    steps: list[int] = []
    resumed = run_runtime(
        "runtime_uniform", tiny, **options, progress=lambda *told: steps.append(told[0]), folder=tmp_path / "runs"
    )
    assert 0 < len(steps) < steps[-1]
    for name, value in whole.gated.state_dict().items():
        assert torch.equal(value, resumed.gated.state_dict()[name]), name
    assert resumed.search.accuracy == whole.search.accuracy
    # And once more: it is only measured, and another share has a checkpoint of its own.
    run_runtime("runtime_uniform", tiny, **options, progress=stop, folder=tmp_path / "runs")
    run_runtime("runtime_uniform", tiny, **{**options, "keep": 0.9, "epochs": 1}, folder=tmp_path / "runs")
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert checkpoint.exists()


# What results count


def test_every_method_learns_and_leaves_the_task_alone(task: Task, results: dict[str, RuntimeResult]) -> None:
    assert not set(RUNTIME_METHODS) & set(METHODS)
    fresh = prune_env.make_task("digits-cnn", epochs=6).network.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in task.network.state_dict().items())
    for name, result in results.items():
        assert result.method == RUNTIME_METHODS[name].name == name
        assert result.search.accuracy > 0.3, name
        assert len(result.training.losses) == 2
        assert not result.gated.training
        assert result.gated.decide is None


def test_costs_are_those_of_the_shares(task: Task, results: dict[str, RuntimeResult]) -> None:
    graph = trace(task.network, task.example)
    for name, result in results.items():
        full = result.gated.full
        active = np.round(KEEP * full).astype(int)
        kept = active if name == "static_uniform" else full
        assert result.kept.tolist() == kept.tolist()
        bare = graph.macs(Plan({n: range(c) for n, c in zip(result.gated.names, active, strict=True)}))
        small = result.gated.cut(Plan({n: range(c) for n, c in zip(result.gated.names, kept, strict=True)}))
        predictors = sum(layer.gate.weight.numel() for layer in small.layers)
        assert set(result.search.macs.tolist()) == {bare + predictors}
        assert len(result.search.macs) == len(task.search)
        assert (result.search.params < result.search.dense_params) is (name == "static_uniform")


def test_fbs_has_no_static_scores_and_static_pruning_chooses_by_them(results: dict[str, RuntimeResult]) -> None:
    for name in ("fbs", "runtime_uniform"):
        assert all((score == 1).all() for score in results[name].gated.static.scores())
    scores = [score.detach() for score in results["static_uniform"].gated.static.scores()]
    assert all(len(score.unique()) > 1 for score in scores)
    asked: list[torch.Tensor] = []
    gated, decide = results["static_uniform"].gated, results["static_uniform"].decide
    gated.decide = lambda question: asked.append(decide(question)) or asked[-1]
    with torch.no_grad():
        gated(torch.randn(5, 1, 8, 8))
    gated.decide = None
    for active, score in zip(asked, scores, strict=True):
        assert (active == active[0]).all()
        assert score[active[0]].min() >= score[~active[0]].max()


def test_the_test_split_is_read_once_and_only_when_asked_for(
    results: dict[str, RuntimeResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, reads = results["fbs"], []
    measure = runtime.measure_runtime
    monkeypatch.setattr(runtime, "measure_runtime", lambda *args, **rest: reads.append(1) or measure(*args, **rest))
    assert "test" not in vars(result)
    assert result.test is result.test
    assert reads == [1]
    assert len(result.test.macs) == len(result._test) != len(result.search.macs)
    assert result.test.accuracy > 0.3


# Budgets


@pytest.mark.parametrize("trust", [*(pytest.param(end, marks=pytest.mark.slow) for end in (0.0, 1.0)), 0.5])
def test_a_budget_is_met_in_the_mean_by_the_largest_share_that_does(
    tiny: Task, trust: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(task: Task) -> GatedNetwork:
        gated = attached(task)
        with torch.no_grad():
            for layer, static in zip(gated.layers, gated.static.scores(), strict=True):
                layer.gate.weight.normal_()
                static.uniform_()
        return gated

    monkeypatch.setattr(runtime, "train", lambda *args, **rest: TrainReport((), ()))
    own = RuntimeMethod("own", "-", prepare)
    torch.manual_seed(1)
    result = run_runtime(own, tiny, budget=0.4, epochs=1, trust=trust)
    images = [tiny.calibration(runtime.CALIBRATION)]

    def mean(keep: float) -> float:
        decide = uniform(result.gated, keep, trust)
        kept = stored(result.gated, decide)
        return runtime.measure_runtime(result.gated, decide, images, kept=kept, dtype=torch.float32).macs_share

    assert mean(result.keep) <= 0.4 < mean(result.keep + 2**-10)
    assert result.trust == trust
    assert result.search.macs_share == pytest.approx(0.4, abs=0.05)  # other images
    assert (len(np.unique(result.search.macs)) > 1) is (trust == 0.5)
    torch.manual_seed(1)
    assert run_runtime(own, tiny, budget=int(0.4 * result.search.dense_macs), epochs=1, trust=trust).keep == result.keep


def test_the_share_of_a_budget_by_hand() -> None:
    gated = attached(own_task("chain"))
    dense = float(gated.graph.cost["macs"](gated.graph.full))

    def macs(keep: float) -> float:
        return 100 + round(10 * keep) * dense / 10

    assert share_of(gated, 0.5, macs) == pytest.approx(0.45, abs=2**-11)  # .5 would be 100 over
    assert share_of(gated, 1.0, lambda keep: keep * dense) == 1.0
    with pytest.raises(ValueError, match="the smallest share allowed"):
        share_of(gated, 0.01, lambda keep: dense / 2)


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of keep and budget"),
        ({"keep": 0.5, "budget": 0.5}, "exactly one of keep and budget"),
        ({"keep": 0.0}, r"keep is 0.0; .*\(0, 1\]"),
        ({"keep": 1.5}, r"keep is 1.5; .*\(0, 1\]"),
        ({"keep": True}, "keep is True"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"budget": 0.001}, "smallest share allowed"),
        ({"budget": -1.0}, "budget is -1.0"),
        ({"keep": 0.5, "trust": 1.5}, r"runtime_trust is 1.5; .*\[0, 1\]"),
        ({"keep": 0.5, "trust": -0.1}, r"runtime_trust is -0.1; .*\[0, 1\]"),
        ({"keep": 0.5, "trust": float("nan")}, "runtime_trust is nan"),
        ({"keep": 0.5, "epochs": 0}, "epochs is 0"),
        ({"keep": 0.5, "threads": -1}, "threads is -1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(task: Task, options: dict[str, Any], said: str) -> None:
    def never(done: int, total: int, what: str) -> None:
        raise AssertionError("training began")

    with pytest.raises(ValueError, match=said):
        run_runtime("fbs", task, **{"epochs": 1, **options}, progress=never)


def test_a_network_without_a_gateable_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer that can carry a gate"):
        run_runtime(
            "fbs", dataclasses.replace(own_task("grouped"), data="digits", network_name="cnn"), keep=0.5, epochs=1
        )


def test_a_diverging_training_stops_at_its_last_good_epoch_and_goes_on_from_there(tiny: Task, tmp_path: Path) -> None:
    networks: list[GatedNetwork] = []

    def prepare(task: Task) -> GatedNetwork:
        networks.append(attached(task))
        return networks[-1]

    def poison(done: int, total: int, what: str) -> None:
        if what.startswith("epoch 2/3"):
            with torch.no_grad():
                networks[-1].layers[0].shift.fill_(float("nan"))

    own, options = RuntimeMethod("own", "-", prepare), {"keep": KEEP, "epochs": 3}
    with pytest.raises(TrainingDiverged, match="epoch 2"):
        run_runtime(own, tiny, **options, folder=tmp_path, progress=poison)
    stopped = networks[-1]
    assert all(value.isfinite().all() for value in stopped.state_dict().values())
    assert stopped.decide is None
    resumed = run_runtime(own, tiny, **options, folder=tmp_path).gated.state_dict()
    for name, value in run_runtime(own, tiny, **options).gated.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_a_misspelt_method_is_refused_with_the_closest(task: Task) -> None:
    with pytest.raises(ValueError, match="did you mean 'static_uniform'"):
        run_runtime("static_unifrom", task, keep=0.5, epochs=1)


@pytest.mark.parametrize(("trust", "shared"), [(0.0, True), (0.5, True), (1.0, False)])
def test_static_scores_that_decide_start_from_the_scales(
    trust: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(task: Task) -> GatedNetwork:
        gated = runtime.attached(task)
        for layer in gated.layers:
            layer.gate.bias.data.copy_(torch.linspace(1, 2, layer.channels))
        return gated

    def stop(gated: GatedNetwork, *_: object, **__: object) -> None:
        begun.extend(score.detach() for score in gated.static.scores())
        raise KeyboardInterrupt

    begun: list[torch.Tensor] = []
    monkeypatch.setattr(runtime, "train_uniform", stop)
    method = dataclasses.replace(RUNTIME_METHODS["static_uniform"], prepare=prepare)
    with pytest.raises(KeyboardInterrupt):
        run_runtime(method, prune_env.make_task("digits-cnn", epochs=0), keep=KEEP, epochs=1, trust=trust)
    for score in begun:
        wanted = (torch.linspace(1, 2, len(score)) / 1.5).sqrt()
        torch.testing.assert_close(score, wanted if shared else torch.ones_like(wanted))
    assert begun
