"""The laws of `tests/contracts.py`, over the tables of networks, rewards and importances."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from prune_env.config import make_env, problem_from
from prune_env.envs.dynamics import Problem
from prune_env.envs.reward import REWARDS
from prune_env.pruning.graph import Group, LayerGraph
from prune_env.pruning.importance import IMPORTANCES, score
from prune_env.pruning.plan import Plan
from prune_env.pruning.tracing import trace
from prune_env.tasks.networks import make_network
from tests import contracts

# Shapes of the zoo's quick networks: channels and side of an image.
ZOO = {"cnn": (1, 8), "lenet300100": (1, 28), "resnet20": (3, 16)}
CLASSES = 5
IMAGES = 12


def data(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images with random labels."""
    channels, side = ZOO[name]
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(IMAGES, channels, side, side, generator=draw),
        torch.randint(CLASSES, (IMAGES,), generator=draw),
    )


@cache
def network(name: str) -> nn.Module:
    """A network of the zoo with random weights and, so that no channel is like another, random norm statistics."""
    channels, side = ZOO[name]
    made = make_network(name, classes=CLASSES, channels=channels, side=side, seed=0).eval()
    draw = torch.Generator().manual_seed(5)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=draw)
    return made


@cache
def graph(name: str) -> LayerGraph:
    return trace(network(name), data(name, 1)[0][:1])


def problem(name: str, **options) -> Problem:
    return problem_from(network(name), calibration=data(name, 1), search=data(name, 2), name=name, **options)


def plans(name: str, number: int = 3) -> list[Plan]:
    rng = np.random.default_rng(7)
    return [contracts.random_plan(graph(name), rng) for _ in range(number)]


@pytest.mark.parametrize("name", ZOO)
def test_law_1_the_cut_network_computes_what_the_masked_one_does(name):
    for plan in plans(name):
        contracts.cut_agrees_with_masked(network(name), graph(name), data(name, 3)[0], plan)


@pytest.mark.parametrize("name", ZOO)
def test_law_2_the_full_plan_is_the_identity(name):
    contracts.full_plan_is_the_identity(network(name), graph(name), data(name, 3)[0])


@pytest.mark.parametrize("reward", REWARDS)
def test_law_2_the_full_plan_earns_what_the_dense_network_earns(reward):
    env = make_env(problem=problem("cnn", budget=1, reward=reward, recalibrate=False, refit="none"))
    env.reset()
    terminated = False
    while not terminated:
        _, value, terminated, _, info = env.step(np.ones(1, dtype=np.float32))
    dense = env.problem.dense
    assert (info["accuracy"], info["macs"], info["params"]) == (dense.accuracy, dense.macs, dense.params)
    assert info["loss"] == pytest.approx(dense.loss)
    terms = env.problem.reward(dense, dense, env.state.budget)
    assert value == pytest.approx(sum(terms.values()))
    assert terms.get("budget", 0.0) == 0.0


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_law_3_permuting_channels_permutes_importance(name, importance):
    before = score(importance, network(name), graph(name), data(name, 1))
    for group in graph(name).groups[1:2]:
        order = np.random.default_rng(1).permutation(group.channels)
        moved = permuted(network(name), group, order=order)
        after = score(importance, moved, graph(name), data(name, 1))
        np.testing.assert_allclose(
            np.asarray(after[group.name]), np.asarray(before[group.name])[order], rtol=2e-3, atol=1e-7
        )


def permuted(dense: nn.Module, group: Group, *, order: np.ndarray) -> nn.Module:
    """The same function with a group's channels in another order: place i holds what was channel order[i]."""
    moved = copy.deepcopy(dense)
    for slot in group.slots:
        module = moved.get_submodule(slot.module)
        source = np.empty_like(slot.index)
        for unit in range(group.channels):
            source[slot.unit == unit] = slot.index[slot.unit == order[unit]]
        into, origin = torch.from_numpy(slot.index), torch.from_numpy(source)
        axis = 1 if slot.role == "in" else 0
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dim() and not (name == "bias" and slot.role == "in"):
                tensor.data.index_copy_(axis, into, tensor.data.index_select(axis, origin).clone())
    return moved


@pytest.mark.parametrize("name", ZOO)
def test_law_4_counted_cost_is_the_closed_form(name):
    for plan in plans(name, 2):
        contracts.counted_cost_is_the_closed_form(network(name), graph(name), data(name, 3)[0], plan)


@pytest.mark.parametrize("name", ZOO)
def test_law_5_keeping_more_never_lowers_cost(name):
    rng = np.random.default_rng(0)
    for _ in range(5):
        contracts.keeping_more_never_lowers_cost(graph(name), rng)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("resource", ["macs", "params"])
def test_law_6_every_episode_ends_inside_its_budget(name, resource):
    env = make_env(problem=problem(name, budget=0.9, budget_resource=resource, refit="none"))
    least, total = env.problem.minimum, env.problem.total
    contracts.episodes_end_inside_their_budget(
        env, episodes=4, budgets=[0.9, least, (least + 1) / total, (least + total) // 2]
    )


@pytest.mark.parametrize("reward", REWARDS)
def test_law_6_holds_for_every_reward(reward):
    env = make_env(problem=problem("cnn", reward=reward, round_to=4))
    contracts.episodes_end_inside_their_budget(env, episodes=4, budgets=[0.5, 0.9])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_law_7_twin_envs_agree_for_every_importance(importance):
    options = {"importance": importance, "budget_range": (0.3, 0.9)}
    contracts.twins_agree(
        make_env(problem=problem("cnn", **options)), make_env(problem=problem("cnn", **options)), episodes=1
    )


@pytest.mark.parametrize("reward", REWARDS)
def test_law_7_twin_envs_agree_for_every_reward(reward):
    contracts.twins_agree(
        make_env(problem=problem("cnn", reward=reward)), make_env(problem=problem("cnn", reward=reward)), episodes=2
    )


def test_law_7_twin_envs_agree_on_a_residual_network():
    contracts.twins_agree(
        make_env(problem=problem("resnet20", budget_range=(0.4, 0.9))),
        make_env(problem=problem("resnet20", budget_range=(0.4, 0.9))),
        episodes=3,
    )


def test_law_8_a_plan_replays_in_a_fresh_process(tmp_path):
    contracts.plan_replays_from_json(
        network("cnn"), graph("cnn"), data("cnn", 3)[0], plan=plans("cnn")[0], folder=tmp_path
    )


@pytest.mark.parametrize("refit", ["none", "moments", "sequential"])
def test_law_8_a_plan_from_json_measures_the_same_in_another_problem(refit):
    env = make_env(problem=problem("cnn", refit=refit))
    env.reset()
    terminated = False
    while not terminated:
        *_, terminated, _, info = env.step(np.full(1, 0.6, dtype=np.float32))
    measured = problem("cnn", refit=refit).evaluator.measure(Plan.from_json(info["plan"]))
    assert (measured.accuracy, measured.loss) == (info["accuracy"], info["loss"])
    assert (measured.macs, measured.params) == (info["macs"], info["params"])
