"""The laws of the project as functions: each takes what a table entry makes, and fails with the law that is broken.

`tests/env/test_laws.py` runs them over networks, rewards and importances; a new table entry is picked up by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils.env_checker import data_equivalence
from safetensors.torch import load_file, save_file
from torch import nn

from prune_env.envs import dynamics
from prune_env.envs.dynamics import Problem
from prune_env.pruning import archive
from prune_env.pruning.graph import LayerGraph
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut, masked

REPLAY = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import prune_env
folder = Path(sys.argv[1])
network, images = prune_env.load(folder / "network"), load_file(folder / "images.safetensors")["images"]
plan = prune_env.Plan.from_json((folder / "plan.json").read_text())
graph = prune_env.trace(network, images[:1])
with torch.no_grad():
    save_file({"outputs": prune_env.cut(network, graph, plan)(images)}, folder / "outputs.safetensors")
"""


def random_plan(graph: LayerGraph, rng: np.random.Generator) -> Plan:
    """Any non-empty channels of any group."""
    keep = {}
    for group in graph.groups:
        count = int(rng.integers(1, group.channels + 1))
        keep[group.name] = tuple(sorted(rng.choice(group.channels, count, replace=False).tolist()))
    return Plan(keep)


def cut_agrees_with_masked(network: nn.Module, graph: LayerGraph, images: torch.Tensor, plan: Plan) -> None:
    """Law 1."""
    with torch.no_grad():
        small = cut(network, graph, plan)(images)
        with masked(network, graph, plan):
            whole = network(images)
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-5 * max(1.0, float(whole.abs().max())))


def full_plan_is_the_identity(network: nn.Module, graph: LayerGraph, images: torch.Tensor) -> None:
    """Law 2."""
    plan = Plan.full(graph)
    same = cut(network, graph, plan)
    with torch.no_grad():
        torch.testing.assert_close(same(images), network(images), rtol=0, atol=0)
    assert graph.macs(plan) == count_macs(network, images[:1]) == count_macs(same, images[:1])
    assert graph.params(plan) == count_params(network) == count_params(same)


def counted_cost_is_the_closed_form(network: nn.Module, graph: LayerGraph, images: torch.Tensor, plan: Plan) -> None:
    """Law 4."""
    small = cut(network, graph, plan)
    assert graph.macs(plan) == count_macs(small, images[:1])
    assert graph.params(plan) == count_params(small)


def keeping_more_never_lowers_cost(graph: LayerGraph, rng: np.random.Generator) -> None:
    """Law 5, for macs and params."""
    counts = rng.integers(1, graph.full + 1)
    for cost in graph.cost.values():
        for group in range(len(counts)):
            more = counts.copy()
            more[group] = graph.full[group]
            assert cost(more) >= cost(counts)


def episodes_end_inside_their_budget(env: gymnasium.Env, *, episodes: int, budgets: list[float | int]) -> None:
    """Law 6: some action is feasible in every state, no group is ever empty, every episode ends inside its budget."""
    problem: Problem = env.unwrapped.problem
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        budget = budgets[episode % len(budgets)]
        # Actions that lean to one side try the budget harder than fair ones.
        lean = rng.uniform(0.2, 5.0)
        env.reset(seed=episode, options={"budget": budget})
        limit = problem.budget_of(budget).limit
        terminated = False
        while not terminated:
            assert dynamics.feasible(problem, env.unwrapped.state)[0] >= 1
            action = np.array([rng.random() ** lean], dtype=np.float32)
            _, _, terminated, truncated, info = env.step(action)
            assert not truncated
        assert min(info["counts"]) >= 1
        assert info[problem.resource] <= limit
        assert info["budget_met"]


def twins_agree(one: gymnasium.Env, other: gymnasium.Env, *, episodes: int) -> None:
    """Law 7: the same seed and actions give the same observations, rewards and infos; what was handed out stays."""
    one.action_space.seed(3)
    handed_out: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    for episode in range(episodes):
        seed = 11 if episode == 0 else None
        first, second = one.reset(seed=seed), other.reset(seed=seed)
        terminated = False
        while True:
            assert data_equivalence(first, second, exact=True)
            handed_out.append((first[0], {name: value.copy() for name, value in first[0].items()}))
            if terminated:
                break
            action = one.action_space.sample()
            first, second = one.step(action), other.step(action)
            terminated = first[2]
    for seen, copied in handed_out:
        assert data_equivalence(seen, copied, exact=True)


def plan_replays_from_json(
    network: nn.Module, graph: LayerGraph, images: torch.Tensor, *, plan: Plan, folder: Path
) -> None:
    """Law 8: Plan -> JSON -> Plan is equal, and in a fresh process the cut network's outputs are equal."""
    assert Plan.from_json(plan.to_json()) == plan
    (folder / "plan.json").write_text(plan.to_json())
    archive.save(network, Plan.full(graph), folder / "network")
    save_file({"images": images.contiguous()}, folder / "images.safetensors")
    subprocess.run([sys.executable, "-c", REPLAY, str(folder)], check=True, env=environment(), timeout=120)
    with torch.no_grad():
        expected = cut(network, graph, plan)(images)
    outputs = load_file(folder / "outputs.safetensors")["outputs"]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def shaping_leaves_the_start_alone(
    plain: gymnasium.Env, shaped: gymnasium.Env, *, discount: float, episodes: int, seed: int = 0
) -> None:
    """Law 9: under the agent's own discount, shaped minus plain return depends only on the start state.

    Played by random policies of every lean; nothing but rewards may differ.
    """
    rng, start = np.random.default_rng(seed), []
    for episode in range(episodes):
        lean, factor, difference, terminated = rng.uniform(0.2, 5.0), 1.0, 0.0, False
        options = {"budget": float(rng.uniform(0.3, 1.0))}
        first, second = (env.reset(seed=episode, options=options) for env in (plain, shaped))
        while not terminated:
            assert data_equivalence(first[0], second[0], exact=True)
            action = np.array([rng.random() ** lean], dtype=np.float32)
            first, second = plain.step(action), shaped.step(action)
            assert first[2:4] == second[2:4]
            assert data_equivalence({**first[4], "reward/shaping": second[4]["reward/shaping"]}, second[4], exact=True)
            difference += factor * (second[1] - first[1])
            factor, terminated = factor * discount, first[2]
        start.append(difference)
    np.testing.assert_allclose(start, start[0], rtol=0, atol=1e-9)


def environment(**changes: Any) -> dict[str, str]:
    """Variables of a fresh process that finds the project and keeps to one thread."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **changes}
