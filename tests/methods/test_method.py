"""Laws that every entry of METHODS keeps, on networks of each kind, and what `prune` promises and refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import baselines
from baselines import METHODS, Case, Method, prune
from baselines import method as method_module
from prune_env.config import make_problem
from prune_env.envs.dynamics import Problem
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import Meter, count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.tasks.task import Task
from tests.env.small_networks import example
from tests.methods.own_tasks import own_task

KINDS = ("chain", "residual", "grouped", "depthwise")
"""A chain with a flatten, a residual stream, grouped convolutions, an inverted residual."""
HARDEST = ("residual", "depthwise")
"""Of which the fast suite has what the other two have in the slow one."""
SELF_DECIDING = {"polarization", "scop_negative", "scop_fdr", "directional_pruning"}
"""Methods whose own ratios may be below any budget."""
TRAINED = [name for name, method in METHODS.items() if method.prepare is not method_module.unprepared]
PAIRS = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * (name in TRAINED and kind not in HARDEST))
    for kind in KINDS
    for name in METHODS
]
"""Each method on each kind of network; what trains takes its time, and is fast on the two hardest alone."""
PLAIN: dict[str, Any] = {"recalibrate": False, "refit": False, "calibration_images": 96}
REPAIRED: dict[str, Any] = {"calibration_images": 96}


@pytest.fixture(scope="module")
def built() -> dict[Any, Any]:
    """Problems already built: tracing a network takes longer than pruning it by all methods."""
    return {}


@pytest.fixture(autouse=True)
def build_once(built: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def make_once(task: Task, **options: Any) -> Problem:
        # What a method prepared is read from the same file each time.
        key = (task.name, task.weights, tuple(options.items()))
        if key not in built:
            built[key] = make_problem(task, **options)
        return built[key]

    monkeypatch.setattr(baselines, "make_problem", make_once)


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest) -> Task:
    return own_task(request.param)


@pytest.fixture(autouse=True)
def left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does with its task, no method changes it."""
    network = request.getfixturevalue("task").network if "task" in request.fixturenames else nn.Identity().eval()
    before = copy.deepcopy(network.state_dict())
    yield
    assert not any(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@cache
def graph_of(kind: str) -> LayerGraph:
    """Traced once: the networks of a kind are alike."""
    task = own_task(kind)
    return trace(task.network, task.example)


@pytest.mark.parametrize(("task", "method"), PAIRS, indirect=["task"])
@pytest.mark.parametrize(
    ("resource", "share"),
    [
        *(("macs", 0.6), ("params", None)),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("macs", None), ("params", 0.6))),
    ],
)
def test_every_method_keeps_its_budget_as_torch_counts_it(
    task: Task, method: str, resource: str, share: float | None
) -> None:
    """As a share, or as a number; repaired, or not."""
    count = {"macs": lambda network: count_macs(network, example()), "params": count_params}[resource]
    limit = share * count(task.network) if share else int(0.75 * count(task.network))
    result = prune(method, task, budget=share or limit, budget_resource=resource, **(REPAIRED if share else PLAIN))
    assert count(result.network) == getattr(result.search, resource) <= limit
    assert all(count >= 1 for count in result.counts.values())


@pytest.mark.parametrize(("task", "method"), PAIRS, indirect=["task"])
def test_keeping_everything_is_the_identity_of_the_network_that_was_prepared(task: Task, method: str) -> None:
    x, full = example(5), Plan.full(graph_of(task.network_name))
    aims = ({"keep": 1.0},) if method in SELF_DECIDING else ({"keep": 1.0}, {"budget": 1.0})
    prepared = METHODS[method].prepare(task, 0, None).network
    with torch.no_grad():
        for aim in aims:
            result = prune(method, task, **aim, calibration_images=96)
            assert result.plan == full
            torch.testing.assert_close(result.network(x), prepared(x))
            assert (result.search.macs, result.search.params) == (count_macs(task.network, x), count_params(prepared))


@pytest.mark.parametrize("method", sorted(SELF_DECIDING))
def test_a_budget_that_own_ratios_do_not_need_changes_nothing(method: str) -> None:
    task = own_task("residual")
    free = prune(method, task, budget=1.0, **PLAIN)
    share = free.search.macs / count_macs(task.network, example())
    assert share < 1
    assert prune(method, task, budget=(1 + share) / 2, **PLAIN).plan == free.plan


@pytest.mark.parametrize(
    "task", [kind if kind in HARDEST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS], indirect=True
)
def test_a_budget_at_the_reachable_minimum_gives_the_smallest_network_and_less_is_refused(task: Task) -> None:
    graph = trace(task.network, task.example)
    least = int(graph.cost["macs"](np.ones(len(graph.groups), dtype=np.int64)))
    for method in METHODS:
        result = prune(method, task, budget=least, **PLAIN)
        assert set(result.counts.values()) == {1}, method
        assert result.search.macs == least
    with pytest.raises(ValueError, match=f"{least:,}"):
        prune("uniform", task, budget=least - 1, **PLAIN)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_plan_and_the_same_measurement(method: str, built: dict[Any, Any]) -> None:
    task = own_task("residual")
    first = prune(method, task, budget=0.5, seed=3, calibration_images=96)
    built.clear()
    second = prune(method, task, budget=0.5, seed=3, calibration_images=96)
    assert first.plan == second.plan
    assert first.search == second.search
    assert first.test == second.test


def test_counts_respect_multiples_minimum_and_groups_left_alone() -> None:
    task = own_task("chain")
    graph = trace(task.network, task.example)
    alone = graph.groups[1].name
    full = {group.name: group.channels for group in graph.groups}
    for method in METHODS:
        counts = prune(method, task, budget=0.75, round_to=4, min_channels=2, leave=(alone,), **PLAIN).counts
        assert counts[alone] == full[alone]
        assert all(count % 4 == 0 or count == full[name] for name, count in counts.items())


def test_random_differs_from_seed_to_seed() -> None:
    task = own_task("chain")
    plans = {tuple(prune("random", task, budget=0.5, seed=seed, **PLAIN).counts.values()) for seed in range(5)}
    assert len(plans) > 1


def test_keep_is_the_same_share_in_every_group_whatever_the_method() -> None:
    task = own_task("chain")
    full = trace(task.network, task.example).full
    for method in METHODS:
        result = prune(method, task, keep=0.5, **PLAIN)
        np.testing.assert_array_equal(list(result.counts.values()), np.round(full / 2))


def test_the_search_measurement_is_what_the_env_would_measure() -> None:
    task = own_task("residual")
    problem = make_problem(task, budget=0.5, calibration_images=96)
    result = prune("uniform", task, budget=0.5, calibration_images=96)
    assert problem.evaluator.measure(result.plan) == result.search
    assert prune("uniform", task, budget=0.5, **PLAIN).search != result.search


def test_the_test_split_is_read_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def meter(images: torch.Tensor, *rest: Any, **options: Any) -> Meter:
        built.append(len(images))
        return Meter(images, *rest, **options)

    monkeypatch.setattr(method_module, "Meter", meter)
    result = prune("uniform", own_task("chain"), budget=0.5, **PLAIN)
    assert built == []
    assert result.test is result.test
    assert built == [80]
    assert (result.test.macs, result.test.params) == (result.search.macs, result.search.params)


def test_a_method_of_ones_own_is_its_choice_at_four_stages() -> None:
    seen: list[str] = []

    def prepare(task: Task, seed: int, progress: object) -> Task:
        seen.append(f"prepare {seed}")
        network = copy.deepcopy(task.network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        return replace(task, network=network)

    def importance(case: Case) -> dict[str, np.ndarray]:
        assert case.task is not None
        return {name: -np.asarray(score) for name, score in case.problem.scores.items()}

    def allocate(case: Case) -> np.ndarray:
        return case.choices.minimum + 1

    def repair(case: Case, plan: Plan) -> nn.Module:
        seen.append("repair")
        return cut(case.task.network, case.problem.graph, plan)

    task = own_task("chain")
    own = Method("own", "none", prepare=prepare, importance=importance, allocate=allocate, repair=repair)
    result = prune(own, task, budget=0.9, seed=7, **PLAIN)
    assert seen == ["prepare 7", "repair"]
    assert set(result.counts.values()) == {2}
    kept = prune("uniform", task, keep=1.0, **PLAIN)
    graph, scores = trace(task.network, task.example), make_problem(task, calibration_images=96).scores
    group = graph.groups[0].name
    assert set(result.plan.keep[group]) == set(np.argsort(scores[group])[:2].tolist())
    weight = next(iter(result.network.parameters()))
    dense = next(iter(kept.network.parameters()))[list(result.plan.keep[group])]
    torch.testing.assert_close(weight, dense * 1.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "unifrom", "budget": 0.5}, "did you mean 'uniform'"),
        ({"method": "uniform"}, "exactly one of budget and keep"),
        ({"method": "uniform", "budget": 0.5, "keep": 0.5}, "exactly one of budget and keep"),
        ({"method": "uniform", "keep": 0.0}, r"keep is 0.0; a share .* in \(0, 1\]"),
        ({"method": "uniform", "keep": 1.5}, "keep is 1.5"),
        ({"method": "uniform", "keep": float("nan")}, "keep is nan"),
        ({"method": "uniform", "keep": True}, "keep is True"),
        ({"method": "uniform", "budget": 0}, "budget"),
        ({"method": "uniform", "budget": -0.5}, "budget"),
        ({"method": "uniform", "budget": 1.5}, "budget"),
        ({"method": "uniform", "budget": float("nan")}, "budget"),
        ({"method": "uniform", "budget": 10**12}, "budget"),
        ({"method": "uniform", "budget": 0.5, "budget_resource": "mac"}, "did you mean 'macs'"),
        ({"method": "uniform", "budget": 0.5, "budget_resource": "latency_s"}, "budget_resource"),
        ({"method": "uniform", "budget": 0.5, "importance": "l11"}, "did you mean 'l1'"),
        ({"method": "uniform", "budget": 0.5, "refit": "moment"}, "did you mean 'moments'"),
        ({"method": "uniform", "budget": 0.5, "round_too": 8}, "did you mean 'round_to'"),
        ({"method": "uniform", "budget": 0.5, "leave": ("nowhere",)}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    method = options.pop("method")
    with pytest.raises(ValueError, match=message) as caught:
        prune(method, own_task("chain"), **options)
    assert "\n" not in str(caught.value)


def test_every_entry_is_named_as_in_the_table_and_says_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper
