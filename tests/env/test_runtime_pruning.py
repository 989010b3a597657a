"""RuntimePruning-v0: Gymnasium's and Stable-Baselines3's rules, seeds, what decisions cost, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import prune_env
from prune_env.envs.runtime_dynamics import IMAGE_FIELDS, LossMean, Passage, RuntimeProblem, Scale, budget_term, rewards
from prune_env.envs.runtime_pruning import RuntimePruningEnv, RuntimePruningVectorEnv
from prune_env.pruning.gating.fixed import SameChannels
from prune_env.pruning.gating.measurement import Habits
from prune_env.pruning.gating.tradeoff import decide_static
from prune_env.pruning.gating.walk import Walker
from prune_env.pruning.measure import count_macs, count_params
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.runtime_config import RuntimeConfig, make_runtime_env, make_runtime_problem, make_runtime_vec
from tests import contracts
from tests.env.gated_networks import build, graph_of, trained
from tests.env.small_networks import example
from tests.methods.own_tasks import own_task

ID = "prune_env/RuntimePruning-v0"
IMAGES = 12


@cache
def _base(name: str) -> RuntimeProblem:
    gated, generator = trained(name).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gated.layers:
            layer.gate.weight += torch.randn(layer.gate.weight.shape, generator=generator)
    images, labels = torch.randn(IMAGES, 3, 8, 8, generator=generator), torch.arange(IMAGES) % 5
    scale = Scale.of(Walker(gated), images, torch.float32)
    return RuntimeProblem(name, gated, images, labels, scale, dtype=torch.float32)


def problem(name: str = "chain", **options: Any) -> RuntimeProblem:
    """A network with gates that differ from image to image, on random images."""
    return dataclasses.replace(_base(name), **options)


def single(**options: Any) -> RuntimePruningEnv:
    return RuntimePruningEnv(problem(**options))


def vector(images: int = 4, **options: Any) -> RuntimePruningVectorEnv:
    return RuntimePruningVectorEnv(problem(**options), num_envs=images)


def random_actions(env: RuntimePruningVectorEnv, rollouts: int = 1, seed: int = 0) -> np.ndarray:
    """`[steps, images, 2]` shares."""
    shape = (rollouts * len(env.problem.channels), env.num_envs, 2)
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def play(env: RuntimePruningVectorEnv, actions: np.ndarray, **reset: Any) -> list[Any]:
    """All that the env says."""
    return [env.reset(**reset), *(env.step(action) for action in actions)]


def final(env: RuntimePruningVectorEnv, actions: np.ndarray, **reset: Any) -> dict[str, np.ndarray]:
    """The info of one batch's end."""
    return play(env, actions, **reset)[-1][-1]["final_info"]


# Gymnasium's and Stable-Baselines3's rules


def test_gymnasium_has_no_complaint() -> None:
    check_env(single(span=(0.3, 0.9)), skip_render_check=True)


def test_stable_baselines_has_no_complaint_but_its_taste_for_symmetric_actions() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space.*")
        sb3_check_env(single())


def test_twin_environments_agree_for_five_random_episodes_with_drawn_budgets() -> None:
    contracts.twins_agree(single(span=(0.4, 0.9)), single(span=(0.4, 0.9)), episodes=5)


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_twin_batches_agree_for_five_random_rollouts_and_leave_global_generators_alone(trust: float) -> None:
    one, other = vector(trust=trust, span=(0.4, 0.9)), vector(trust=trust, span=(0.4, 0.9))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    actions = random_actions(one, rollouts=5)
    for first, second in zip(play(one, actions, seed=3), play(other, actions, seed=3), strict=True):
        assert data_equivalence(first, second, exact=True)
    assert not data_equivalence(play(one, actions, seed=3), play(other, actions, seed=4))
    assert data_equivalence(play(one, actions, seed=3), play(other, actions, seed=3), exact=True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def vandalise(said: Any) -> None:
    """Overwrite every array that was handed out."""
    if isinstance(said, np.ndarray) and said.dtype == object:
        for value in said:
            vandalise(value)
    elif isinstance(said, np.ndarray):
        said.fill(1)
    elif isinstance(said, dict):
        for value in said.values():
            vandalise(value)
    elif isinstance(said, tuple):
        for value in said:
            vandalise(value)


def test_what_was_handed_out_never_changes_and_is_nobody_else_s() -> None:
    kept, spoilt = vector(), vector()
    actions = random_actions(kept, rollouts=3)
    said, copies = [kept.reset(seed=0)], [copy.deepcopy(spoilt.reset(seed=0))]
    for action in actions:
        said.append(kept.step(action))
        given_away = spoilt.step(action)
        copies.append(copy.deepcopy(given_away))
        vandalise(given_away)
    for one, other in zip(said, copies, strict=True):
        assert data_equivalence(one, other, exact=True)


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_a_batch_speaks_like_gymnasium_s_own_vector_env(name: str) -> None:
    images, options = 3, {"name": name, "trust": 0.5}
    ours = vector(images, **options)
    theirs = SyncVectorEnv([lambda: single(**options)] * images, autoreset_mode=AutoresetMode.SAME_STEP)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    for space in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert getattr(ours, space) == getattr(theirs, space)

    def shape(value: Any) -> Any:
        """Everything about a value but its numbers."""
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in sorted(value.items())}
        if isinstance(value, tuple):
            return tuple(shape(inner) for inner in value)
        inner = [shape(inner) for inner in value] if value.dtype == object and isinstance(value[0], dict) else []
        return value.shape, value.dtype, inner

    actions = random_actions(ours, rollouts=2)
    for one, other in zip(play(ours, actions, seed=0), play(theirs, actions, seed=0), strict=True):
        assert shape(one) == shape(other)
        assert np.array_equal(one[-1]["group"], other[-1]["group"])


def test_all_episodes_end_together_and_the_next_ones_begin_in_the_same_step() -> None:
    env = vector(5)
    layers = len(env.problem.channels)
    first, info = env.reset(seed=0)
    assert info["group"].tolist() == ["body.0.0"] * 5
    assert not first["position"].any()
    for at, action in enumerate(random_actions(env, rollouts=2), 1):
        seen, reward, terminated, truncated, infos = env.step(action)
        assert env.observation_space.contains(seen)
        assert not truncated.any()
        if at % layers:
            assert not terminated.any()
            assert not reward.any()
            assert "final_obs" not in infos
            np.testing.assert_allclose(seen["position"], at % layers / layers)
            np.testing.assert_array_equal(seen["previous_keep"][:, 0], np.clip(action[:, 0], 0.1, 1))
        else:
            assert terminated.all()
            assert (reward != 0).all()
            assert infos["_final_obs"].all()
            assert infos["_final_info"].all()
            assert not seen["position"].any()
            assert infos["group"].tolist() == ["body.0.0"] * 5
            assert infos["final_info"]["group"].tolist() == ["hidden"] * 5
            for last in infos["final_obs"]:
                assert env.single_observation_space.contains(last)
                assert last["position"] == 1
                assert not any(last[name].any() for name in ("layer", "pooled", "runtime_importance"))


def test_every_image_is_drawn_before_one_comes_again() -> None:
    """Those of an autoreset count as well, and none is drawn that nobody sees."""
    for images in (1, 4):
        env = vector(images)
        actions = random_actions(env, rollouts=2 * IMAGES // images)
        said = play(env, actions, seed=0)
        firsts = [step[0]["pooled"] for step in said if not step[0]["position"].any()][: 2 * IMAGES // images]
        for epoch in np.split(np.concatenate(firsts), 2):
            assert len(np.unique(epoch, axis=0)) == IMAGES
    env, seen = single(), []
    for at in range(2 * IMAGES):
        seen.append(env.reset(seed=0 if at == 0 else None)[0]["pooled"])
        for _ in env.problem.channels:
            env.step(np.array([0.5, 0.5]))
    for epoch in np.split(np.stack(seen), 2):
        assert len(np.unique(epoch, axis=0)) == IMAGES


def test_info_of_a_single_image_holds_plain_python_values() -> None:
    env = single()
    assert env.reset(seed=0)[1] == {"group": "body.0.0"}
    for at in range(3):
        *_, reward, terminated, truncated, info = env.step(np.array([0.5, 0.5]))
        assert {type(value) for value in info.values()} <= {str, int, float, bool}
        assert type(reward) is float
        assert terminated is (at == 2)
        assert truncated is False
    assert reward == pytest.approx(sum(term for name, term in info.items() if name.startswith("reward/")))


# What decisions come to


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_a_batch_is_its_images_one_by_one(trust: float) -> None:
    images = 6
    whole = problem(trust=trust)
    whole = dataclasses.replace(whole, images=whole.images[:images], labels=whole.labels[:images])
    batch = RuntimePruningVectorEnv(whole, num_envs=images)
    actions = random_actions(batch)
    actions[..., 1] = actions[:, :1, 1]
    (first, _), *steps = play(batch, actions, seed=0)
    together = [step[-1] for step in steps[:-1]] + [steps[-1][-1]["final_info"]]
    alone = []
    for at in range(images):
        own = dataclasses.replace(whole, images=whole.images[at : at + 1], labels=whole.labels[at : at + 1])
        env = RuntimePruningEnv(own)
        seen, _ = env.reset(seed=0)
        row = int(np.abs(first["pooled"] - seen["pooled"]).max(1).argmin())
        alone.append((row, [env.step(action) for action in actions[:, row]]))
    assert sorted(row for row, _ in alone) == list(range(images))
    for row, lonely in alone:
        for infos, (*_, info) in zip(together, lonely, strict=True):
            for name, value in info.items():
                # Rewards are relative to the mean loss of the batch, images are counted from its first.
                if name not in ("reward/accuracy", "mean_loss", "image", "group"):
                    assert value == pytest.approx(infos[name][row], rel=1e-4), name
        assert lonely[-1][-1]["reward/accuracy"] == -1


@pytest.mark.parametrize("trust", [0.0, 0.3, 0.5, 1.0])
def test_costs_are_those_of_what_is_really_kept(trust: float) -> None:
    env = vector(6, trust=trust)
    steps = play(env, random_actions(env), seed=1)[1:]
    infos = [step[-1] for step in steps[:-1]] + [steps[-1][-1]["final_info"]]
    network, graph = build("chain"), graph_of("chain")
    dense = count_macs(network, example())
    active = np.stack([info["active"] for info in infos], axis=1)
    kept = [int(info["kept"][0]) for info in infos]
    # A predictor reads the stored channels in front of it, a linear layer's each of their 16 positions.
    predictors = 3 * kept[0] + kept[0] * kept[1] + 16 * kept[1] * kept[2]
    for image in range(6):
        plan = Plan({name: range(count) for name, count in zip(env.problem.gated.names, active[image], strict=True)})
        macs = count_macs(cut(network, graph, plan), example()) + predictors
        assert infos[-1]["macs"][image] == pytest.approx(macs / dense)
    stored = cut(
        network, graph, Plan({n: range(count) for n, count in zip(env.problem.gated.names, kept, strict=True)})
    )
    assert infos[-1]["params"] == pytest.approx(count_params(stored) / count_params(network))
    used = [info["macs"] for info in infos]
    assert all((late > early).all() for early, late in pairwise(used))
    assert len(np.unique(used[-1])) > 1 or trust == 0


@settings(max_examples=20)
@given(trust=st.floats(0, 1), keep=st.floats(0, 1), seed=st.integers(0, 999))
def test_what_is_removed_is_never_active_and_the_same_for_all_images(trust: float, keep: float, seed: int) -> None:
    env = vector(5, trust=trust)
    env.reset(seed=seed)
    decided: list[tuple[Any, torch.Tensor]] = []
    advance = env._advance
    env._advance = lambda active: decided.append((env._question, active)) or advance(active)
    actions = random_actions(env, seed=seed)
    actions[..., 1] = keep
    applied = max(float(np.float32(keep)), 0.1)
    for action in actions[:-1]:
        infos = env.step(action)[-1]
        question, active = decided[-1]
        removed = decide_static(question.static, applied, float(trust)).removed
        assert not active[:, removed].any()
        assert active.any(1).all()
        assert set(infos["kept"].tolist()) == {int((~removed).sum())}
        assert infos["static_keep"] == pytest.approx(applied)
        assert (infos["active"] == active.sum(1).numpy()).all()


def test_images_choose_for_themselves_among_what_is_stored() -> None:
    """Not only how many channels: which ones."""
    env = vector(8, trust=0.5)
    env.reset(seed=0)
    question = env._question
    active = env._passage.decide(question, np.full(8, 0.5), 0.5)
    assert set(active.sum(1).tolist()) <= {4, 5}
    assert len(active.unique(dim=0)) > 1


def test_an_observation_by_hand() -> None:
    env = vector(4)
    own, images = env.problem, env.problem.images
    steps = play(env, random_actions(env), seed=0)
    (mean, spread), (score_mean, score_spread) = own.scale.pooled[0], own.scale.runtime[0]
    scores = own.gated.layers[0].scores(images)[2].detach().numpy()
    first = steps[0][0]
    for row in range(4):
        expected = (images.mean((2, 3)) - mean) / (5 * spread)
        image = int((expected - torch.from_numpy(first["pooled"][row, :3])).abs().sum(1).argmin())
        np.testing.assert_allclose(first["pooled"][row, :3], expected[image], rtol=1e-4, atol=1e-6)
        importance = np.clip((scores[image] - score_mean) / (5 * score_spread), -1, 1)
        np.testing.assert_allclose(first["runtime_importance"][row, :8], importance, rtol=1e-3, atol=1e-5)
    assert not first["pooled"][:, 3:].any()
    assert not first["runtime_importance"][:, 8:].any()
    share = 3 * 9 * 8 * 64 / count_macs(build("chain"), example())
    assert first["layer"][0] == pytest.approx([3 / 12, np.log2(3) / 12, 3 / 7, 1 / 4, 6 / 16, share])
    for at, (seen, *_) in enumerate(steps[:-1]):
        assert (seen["index"] == np.eye(4)[at]).all()
    assert not first["spent"].any()
    np.testing.assert_allclose(steps[2][0]["spent"][:, 0], steps[2][-1]["macs"] / 2, rtol=1e-6)
    assert (steps[-1][-1]["final_obs"][2]["index"] == [0, 0, 0, 1]).all()


def test_one_static_decision_is_taken_for_a_batch_that_disagrees() -> None:
    env = vector(4)
    env.reset(seed=0)
    infos = env.step(np.array([[0.5, 0.2], [0.5, 0.4], [0.5, 0.6], [0.5, 1.0]]))[-1]
    assert infos["static_keep"] == pytest.approx(0.55)
    assert len(set(infos["kept"].tolist())) == 1


def test_static_fields_do_not_know_the_image_and_image_fields_do() -> None:
    env = vector(6)
    actions = random_actions(env)
    actions[..., 1] = 0.5
    for seen, *_ in play(env, actions, seed=0)[1:-1]:
        for name, rows in seen.items():
            assert (len(np.unique(rows, axis=0)) > 1) is (name in IMAGE_FIELDS), name


def test_static_shares_that_are_decided_already_leave_actions_no_say() -> None:
    free, fixed = vector(trust=0.5), vector(trust=0.5, static_keeps=(0.5, 0.7, 0.3))
    actions = random_actions(free)
    one = final(fixed, actions, seed=0)
    actions[..., 1] = np.array([0.5, 0.7, 0.3])[:, None]
    other = final(free, actions, seed=0)
    assert one["static_keep"] == pytest.approx(0.3)
    np.testing.assert_array_equal(one["macs"], other["macs"])
    np.testing.assert_array_equal(one["kept"], other["kept"])


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_what_fixed_static_shares_remove_cannot_be_seen(trust: float) -> None:
    """Whatever the removed channels' weights and scores are: after deployment they do not exist."""
    keeps = (0.5, 0.7, 0.3)
    free, fixed = vector(trust=trust), vector(trust=trust, static_keeps=keeps)
    actions = random_actions(free)
    actions[..., 1] = np.array(keeps)[:, None]
    unseen, seen = play(free, actions, seed=0), play(fixed, actions, seed=0)
    before = None
    for at, (layer, keep) in enumerate(zip(fixed.problem.gated.static.scores(), keeps, strict=True)):
        removed = decide_static(layer.detach(), keep, trust).removed.numpy()
        assert removed.any() == (trust < 1)
        for name, values in seen[at][0].items():
            if name.endswith("_importance"):
                assert not values[:, : len(removed)][:, removed].any(), name
                assert values[:, : len(removed)][:, ~removed].any(), name
                values[:, : len(removed)][:, removed] = unseen[at][0][name][:, : len(removed)][:, removed]
            np.testing.assert_array_equal(values, unseen[at][0][name], err_msg=name)
        if before is not None:  # As inputs, removed channels are the same for all images.
            spatial = fixed.problem.inputs[at] // len(before)
            pooled = seen[at][0]["pooled"][:, : fixed.problem.inputs[at]][:, np.repeat(before, spatial)]
            assert (pooled == pooled[:1]).all()
            mean, spread = fixed.problem.scale.pooled[at]
            np.testing.assert_allclose(pooled, np.clip(-mean / (5 * spread), -1, 1), rtol=1e-5)
        before = removed


@pytest.mark.parametrize(
    ("share", "counts"), [(-3.0, [1, 1, 1]), (0.0, [1, 1, 1]), (0.5, [4, 3, 5]), (7.0, [8, 6, 10])]
)
def test_shares_become_counts_and_are_moved_into_what_is_allowed(share: float, counts: list[int]) -> None:
    env = vector(3, trust=1.0)
    steps = play(env, np.full((3, 3, 2), share), seed=0)[1:]
    infos = [step[-1] for step in steps[:-1]] + [steps[-1][-1]["final_info"]]
    assert [info["active"].tolist() for info in infos] == [[count] * 3 for count in counts]


# Rewards


@pytest.mark.parametrize(
    ("over", "cost"), [(0.005, 0.22), (0.01, 0.47), (0.03, 2.06), (0.05, 5.15), (0.10, 32.4), (0.5, 176.9)]
)
def test_budget_terms_by_hand(over: float, cost: float) -> None:
    # 1.2 (exp(over / .03) - 1); the exponent is bounded at 5: 1.2 (e^5 - 1) = 176.9
    assert budget_term(0.25 + over, 0.25, saving=0.1) == pytest.approx(-cost, rel=0.02)
    assert budget_term(0.25 - over, 0.25, saving=0.1) == pytest.approx(0.1 * over)
    assert budget_term(0.25 - over, 0.25, saving=0.0) == 0
    both = budget_term(np.array([0.25 + over, 0.25]), 0.25, saving=0.1)
    assert both.tolist() == pytest.approx([-cost, 0.0], rel=0.02)


def test_the_mean_loss_is_cumulative_for_two_hundred_batches_and_then_decays() -> None:
    mean = LossMean().updated([1.0, 3.0])
    assert mean == LossMean(2.0, 1)
    assert mean.updated([5.0]) == LossMean(3.5, 2)
    assert LossMean(1.0, 150).updated([3.0]).value == pytest.approx(1 + 2 / 151)
    mean = LossMean(1.0, 199).updated([3.0])
    assert mean.value == pytest.approx(1 + 2 / 200)
    assert LossMean(1.0, 200).updated([3.0]).value == pytest.approx(0.995 * 1 + 0.005 * 3)


def test_the_terms_of_a_batch_by_hand() -> None:
    own = problem(trust=0.5, value=0.5)
    passage = Passage(own, own.budget_of(0.5), 2)
    walk = own.walker.walk(own.images[:2])
    with torch.no_grad():
        question = next(walk)
        for _ in range(2):
            question = walk.send(passage.decide(question, np.array([0.3, 1.0]), 0.5))
        passage.decide(question, np.array([0.3, 1.0]), 0.5)
    terms = rewards(np.array([1.0, 4.0]), LossMean(2.0, 7), passage)
    assert terms["accuracy"].tolist() == [-0.5, -2.0]
    cheap, dear = passage.macs()
    assert cheap < 0.5 < dear
    assert terms["macs"] == pytest.approx([0.1 * (0.5 - cheap), -1.2 * np.expm1(min((dear - 0.5) / 0.03, 5))])
    # Half of 8, 6, 10 is doubted, half of that goes: 6, 5 and 8 channels are stored.
    assert passage.kept == [6, 5, 8]
    params = 3 * 9 * 6 + 6 + 12 + 9 * 6 * 5 + 5 + 10 + 16 * 5 * 8 + 8 + 8 * 5 + 5
    assert passage.params() == pytest.approx(params / count_params(build("chain")))
    over = passage.params() - own.params_share(own.budget_of(0.5))
    assert terms["params"] == pytest.approx([-1.2 * np.expm1(over / 0.03) if over > 0 else 0.0] * 2)


def test_the_reward_is_the_sum_of_its_terms_relative_to_the_running_mean() -> None:
    env = vector(4)
    env.reset(seed=0)
    losses = []
    for batch in range(3):
        for action in random_actions(env, seed=batch):
            _, reward, _, _, infos = env.step(action)
        info = infos["final_info"]
        losses.append(info["loss"].mean())
        np.testing.assert_allclose(info["reward/accuracy"], -info["loss"] / np.mean(losses))
        np.testing.assert_allclose(reward, sum(info[f"reward/{name}"] for name in ("accuracy", "macs", "params")))
        np.testing.assert_allclose(info["reward/macs"], budget_term(info["macs"], info["budget"][0], saving=0.1))
    # A seed forgets the mean.
    assert final(env, random_actions(env), seed=0)["reward/accuracy"].mean() == pytest.approx(-1)


def test_loss_and_correctness_are_those_of_the_gated_network() -> None:
    env = vector(4, trust=1.0)
    info = final(env, np.ones((3, 4, 2)), seed=5)
    own = env.problem
    with torch.no_grad():
        logits = own.gated(own.images)
    losses = torch.nn.functional.cross_entropy(logits, own.labels, reduction="none").numpy()
    right = (logits.argmax(1) == own.labels).numpy()
    drawn = [int(np.abs(losses - loss).argmin()) for loss in info["loss"]]
    np.testing.assert_allclose(info["loss"], losses[drawn], rtol=1e-4)
    np.testing.assert_array_equal(info["correct"], right[drawn])


# Budgets


def test_the_even_share_of_a_budget_costs_it() -> None:
    own = problem(trust=0.5)
    forms = own.accounting
    for keep in (0.5, 0.7, 0.33):
        budget = own.budget_of(float(forms.bare_macs(keep * own.channels)) / forms.dense_macs)
        assert own.even_keep(budget) == pytest.approx(keep)
        stored = 1 - 0.5 * (1 - keep)
        assert own.params_share(budget) == pytest.approx(
            float(forms.bare_params(stored * own.channels)) / forms.dense_params
        )
    assert own.even_keep(own.budget_of(1.0)) == pytest.approx(1.0)


def test_the_budget_of_a_batch_can_be_set() -> None:
    env = vector()
    seen, _ = env.reset(seed=0, options={"budget": 0.8})
    assert seen["budget"] == pytest.approx(0.8)
    assert seen["even"] == pytest.approx(env.problem.even_keep(env.problem.budget_of(0.8)))
    limit = int(0.7 * env.problem.accounting.dense_macs)
    assert env.reset(options={"budget": limit})[0]["budget"] == pytest.approx(0.7, abs=1e-4)
    assert env.reset()[0]["budget"] == pytest.approx(0.5)
    info = final(env, random_actions(env), options={"budget": 0.8})
    assert info["budget"] == pytest.approx([0.8] * 4)


def test_drawn_budgets_fill_their_range_and_follow_the_seed() -> None:
    env = vector(span=(0.4, 0.9))

    def drawn() -> list[float]:
        return [float(env.reset(seed=0 if at == 0 else None)[0]["budget"][0, 0]) for at in range(100)]

    budgets = drawn()
    assert budgets == drawn()
    assert 0.4 <= min(budgets) < 0.45
    assert 0.85 < max(budgets) <= 0.9
    (seen, _), *steps = play(env, random_actions(env, rollouts=2), seed=0)
    assert len(np.unique([seen["budget"][0, 0], steps[2][0]["budget"][0, 0], steps[5][0]["budget"][0, 0]])) == 3
    assert len(np.unique(steps[2][0]["budget"])) == 1


@pytest.mark.parametrize("trust", [0.0, 0.25, 0.5, 1.0])
def test_the_minimum_is_what_the_least_actions_cost(trust: float) -> None:
    own = problem(trust=trust)
    used = final(RuntimePruningVectorEnv(own, num_envs=8), np.zeros((3, 8, 2)), seed=0)["macs"]
    least = own.minimum / own.accounting.dense_macs
    assert used.min() >= least - 1e-9
    if trust in (0, 1):  # in between, it takes two decisions that agree
        assert used == pytest.approx(least)
    share = float(re.search(r"so ([\d.]+) is the smallest share allowed", refusal(lambda: own.budget_of(0.01)))[1])
    assert own.budget_of(share).limit >= own.minimum
    assert share == pytest.approx(least, abs=1e-4)


# Bad input


def refusal(call: Callable[[], object]) -> str:
    """The message of a ValueError."""
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("trust", [-0.1, 1.1, float("nan"), True])
def test_a_trust_that_is_no_share_is_refused(trust: Any) -> None:
    assert "[0, 1]" in refusal(lambda: RuntimeConfig.of(runtime_trust=trust))
    assert "runtime_trust" in refusal(lambda: make_runtime_vec(runtime_trust=trust))


@pytest.mark.parametrize("budget", [0, -0.5, 0.01, 1.5, 10**9, float("nan")])
def test_a_budget_that_cannot_be_is_refused(budget: Any) -> None:
    for env in (vector(), single()):
        assert "budget" in refusal(lambda env=env: env.reset(options={"budget": budget}))
        env.reset(seed=0)  # and nothing is broken


def test_a_budget_below_the_minimum_is_refused_when_the_problem_is_built() -> None:
    for options in ({"budget": 0.01}, {"budget_range": (0.01, 0.9)}):
        said = refusal(lambda options=options: make_runtime_problem(own_task("chain"), gate_epochs=0, **options))
        assert "smallest share allowed" in said


def test_a_misspelt_option_is_refused_with_the_closest() -> None:
    assert "'budget'" in refusal(lambda: make_runtime_vec(bugdet=0.5))
    assert "'runtime_trust'" in refusal(lambda: make_runtime_env(runtime_trsut=0.5))
    assert "'filters'" in refusal(lambda: make_runtime_vec(static_importance="filter"))
    assert "'budget'" in refusal(lambda: vector().reset(options={"bugdet": 0.5}))
    assert "['budget']" in refusal(lambda: make_runtime_vec(problem=problem(), budget=0.5))


@pytest.mark.parametrize("number", [0, -1, IMAGES + 1, True])
def test_a_number_of_images_that_cannot_be_is_refused(number: int) -> None:
    assert f"1 to {IMAGES}" in refusal(lambda: vector(number))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (3, 2), (4, 3), (8,), ()])
def test_actions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    env = vector(4)
    env.reset(seed=0)
    assert "4 x 2" in refusal(lambda: env.step(np.full(shape, 0.5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused_and_the_episode_goes_on(bad: float) -> None:
    env, other = vector(4), vector(4)
    actions = random_actions(env)
    spoilt = actions[0].copy()
    spoilt[2, 1] = bad
    env.reset(seed=0)
    assert str(bad) in refusal(lambda: env.step(spoilt))
    assert data_equivalence([env.step(action) for action in actions], play(other, actions, seed=0)[1:], exact=True)
    one = single()
    one.reset(seed=0)
    assert "finite" in refusal(lambda: one.step(np.array([bad, 0.5])))
    assert "shape" in refusal(lambda: one.step(np.array([0.5])))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_network_whose_loss_is_no_number_is_an_error_and_leaves_the_mean_loss_alone(bad: float) -> None:
    env, other = vector(4), vector(4)
    own = problem(gated=copy.deepcopy(env.problem.gated))
    spoilt = RuntimePruningVectorEnv(own, num_envs=4)
    actions = random_actions(env)
    play(spoilt, actions, seed=0)
    mean, shift = spoilt._mean, own.gated.layers[-1].shift
    good = shift.detach().clone()
    with torch.no_grad():
        shift.fill_(bad)
    spoilt.reset()
    for action in actions[:-1]:
        spoilt.step(action)
    with pytest.raises(FloatingPointError, match="the loss of 4 of 4 images is"):
        spoilt.step(actions[-1])
    assert spoilt._mean == mean
    with pytest.raises(ResetNeeded):
        spoilt.step(actions[-1])
    with torch.no_grad():
        shift.copy_(good)
    assert data_equivalence(play(spoilt, actions, seed=0), play(other, actions, seed=0), exact=True)


def test_stepping_before_reset_or_after_the_end_is_refused() -> None:
    with pytest.raises(ResetNeeded):
        vector().step(np.full((4, 2), 0.5))
    env = single()
    with pytest.raises(ResetNeeded):
        env.step(np.array([0.5, 0.5]))
    env.reset()
    for _ in range(3):
        env.step(np.array([0.5, 0.5]))
    with pytest.raises(ResetNeeded):
        env.step(np.array([0.5, 0.5]))


def test_there_is_nothing_to_render() -> None:
    assert "render_mode" in refusal(lambda: RuntimePruningVectorEnv(problem(), num_envs=4, render_mode="ansi"))
    assert "render_mode" in refusal(lambda: RuntimePruningEnv(problem(), render_mode="ansi"))


def test_a_network_without_a_gateable_layer_is_refused() -> None:
    assert "no layer that can carry a gate" in refusal(lambda: make_runtime_problem(own_task("grouped"), gate_epochs=0))


@pytest.mark.parametrize(("field", "value"), [("trust", 2.0), ("min_keep", 0.0), ("min_keep", 1.5), ("value", 0.01)])
def test_a_problem_refuses_shares_that_are_not_allowed(field: str, value: float) -> None:
    refusal(lambda: problem(**{field: value}))
    own = problem()
    assert "one label" in refusal(lambda: dataclasses.replace(own, labels=own.labels[:3]))


# From names


def test_the_id_makes_both_environments() -> None:
    options = {"task": "digits-cnn", "epochs": 0, "gate_epochs": 0, "budget": 0.6, "runtime_trust": 1}
    envs = gymnasium.make_vec(f"prune_env:{ID}", num_envs=3, **options)
    assert isinstance(envs, prune_env.RuntimePruningVectorEnv)
    assert envs.spec.id == ID
    env = gymnasium.make(f"prune_env:{ID}", **options)
    assert isinstance(env.unwrapped, RuntimePruningEnv)
    assert envs.single_observation_space == env.observation_space
    seen, _ = envs.reset(seed=0)
    assert seen["budget"] == pytest.approx(0.6)
    assert envs.problem.trust == 1


FRESH = """
import gymnasium
envs = gymnasium.make_vec(
    "prune_env:prune_env/RuntimePruning-v0", num_envs=8, task="digits-cnn", budget=0.5, epochs=0, gate_epochs=0
)
envs.reset(seed=0)
terminated = [False]
while not all(terminated):
    *_, terminated, _, infos = envs.step(envs.action_space.sample())
assert infos["final_info"]["macs"].shape == (8,), infos
"""


@pytest.mark.slow
def test_make_vec_works_from_a_fresh_interpreter(tmp_path) -> None:
    subprocess.run(
        [sys.executable, "-c", FRESH],
        check=True,
        cwd=tmp_path,
        timeout=200,
        env=contracts.environment(PRUNE_ENV_DATA=str(tmp_path)),
    )


def test_habits_and_the_same_channels_for_all_by_hand():
    habits = Habits(2)
    for first, second in (([[1, 0, 1], [1, 0, 0]], [[1, 1], [1, 1]]), ([[0, 0, 1]], [[1, 1]])):
        habits.note(0, torch.tensor(first, dtype=torch.bool))
        habits.note(1, torch.tensor(second, dtype=torch.bool))
    assert habits.counts.tolist() == [[2, 2], [1, 2], [1, 2]]
    assert [often.tolist() for often in habits.often] == [[2, 0, 2], [3, 3]]
    assert habits.varying == [2, 0]
    same = SameChannels.most_often(habits.often, [1, 5])
    assert [active.tolist() for active in same.channels] == [[True, False, False], [True, True]]
    # One that was never active is not taken, and one channel is always left.
    assert SameChannels.most_often(habits.often, [3, 0]).channels[0].tolist() == [True, False, True]
    assert int(SameChannels.most_often(habits.often, [3, 0]).channels[1].sum()) == 1
    with pytest.raises(ValueError, match="no channel of layer 1 is active"):
        SameChannels([torch.tensor([True]), torch.tensor([False, False])])
