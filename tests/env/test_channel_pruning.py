"""ChannelPruning-v0: Gymnasium's and Stable-Baselines3's rules, seeds, budgets, and what `info` carries."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import prune_env
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.pruning.plan import Plan
from tests import contracts
from tests.env.problems import chain, problem_of

ID = "prune_env/ChannelPruning-v0"


def make(**options) -> ChannelPruningEnv:
    render_mode = options.pop("render_mode", None)
    return ChannelPruningEnv(problem=problem_of(chain([4, 7, 5]), **options), render_mode=render_mode)


def play(env: ChannelPruningEnv, *shares: float) -> list[tuple]:
    env.reset()
    return [env.step(np.array([share], dtype=np.float32)) for share in shares]


@pytest.mark.parametrize("render_mode", [None, "ansi", "rgb_array"])
def test_gymnasium_has_no_complaint(render_mode):
    # warnings are errors here
    check_env(make(render_mode=render_mode), skip_render_check=True)


def test_stable_baselines_has_no_complaint_but_its_taste_for_symmetric_actions():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space.*")
        sb3_check_env(make())


def test_twin_environments_agree_for_five_random_episodes_with_drawn_budgets():
    contracts.twins_agree(make(span=(0.3, 0.9)), make(span=(0.3, 0.9)), episodes=5)


@pytest.mark.parametrize("resource", ["macs", "params"])
@pytest.mark.parametrize("limits", [{}, {"round_to": 4}, {"min_channels": 2}, {"leave": ("conv1",)}])
def test_every_episode_ends_inside_its_budget(resource, limits):
    env = make(resource=resource, limits=limits, budget=0.9)
    least, total = env.problem.minimum, env.problem.total
    contracts.episodes_end_inside_their_budget(
        env, episodes=40, budgets=[0.9, least, (least + 1) / total, 1.0, (least + total) // 2]
    )


def test_an_episode_says_what_became_of_every_action():
    (_, first, _, _, one), (_, second, _, _, two), (_, reward, terminated, truncated, last) = play(
        make(budget=0.5), 0.25, 1.0, 1.0
    )
    # macs = 2 (3 a + a b + b c + 5 c), dense 2 (12 + 28 + 35 + 25) = 200
    assert (first, second) == (0.0, 0.0)
    assert one == {
        "group": "conv0", "requested": 0.25, "applied": 0.25, "channels": 1, "clamped": False,
        "macs": 2 * (3 + 7 + 35 + 25), "params": 70, "budget": 0.5,
    }  # fmt: skip
    assert (two["channels"], two["clamped"], two["macs"]) == (7, False, 140)
    # 2 (3 + 7 + 7 c + 5 c) <= 100 up to c = 3
    assert (last["channels"], last["applied"], last["clamped"], last["macs"]) == (3, 0.6, True, 92)
    assert terminated is True
    assert truncated is False
    assert last["counts"] == (1, 7, 3)
    assert last["budget_met"] is True
    assert reward == last["accuracy"] == last["reward/accuracy"] == pytest.approx((1 / 4 + 1 + 3 / 5) / 3)


def test_the_plan_in_info_is_the_plan_that_was_measured():
    env = make(budget=0.5)
    info = play(env, 0.5, 0.5, 0.5)[-1][-1]
    plan = Plan.from_json(info["plan"])
    assert plan == env.problem.evaluator.seen[-1]
    assert tuple(env.problem.graph.counts(plan)) == info["counts"]


@pytest.mark.parametrize("reward", ["accuracy", "accuracy_guaranteed", "exponential_penalty"])
def test_the_reward_is_the_sum_of_its_named_terms(reward):
    _, value, _, _, info = play(make(reward=reward, hard=False), 0.9, 0.8, 0.7)[-1]
    assert value == pytest.approx(sum(term for name, term in info.items() if name.startswith("reward/")))


def test_a_soft_budget_lets_the_penalty_come_due():
    info = play(make(reward="exponential_penalty", hard=False), 1.0, 1.0, 1.0)[-1][-1]
    assert info["reward/budget"] < 0
    assert info["budget_met"] is False


def test_info_holds_plain_python_values():
    env = make()
    _, info = env.reset()
    assert info == {"group": "conv0", "macs": 200, "params": 100, "budget": 0.5}
    for *_, info in play(env, 0.5, 0.5, 0.5):
        assert {type(value) for value in info.values()} <= {str, int, float, bool, tuple}
        json.dumps(info)


def test_the_budget_of_an_episode_can_be_set():
    env = make(budget=0.5)
    observation, info = env.reset(options={"budget": 0.35})
    assert observation["budget"] == pytest.approx(0.35)
    assert info["budget"] == 0.35
    observation, info = env.reset(options={"budget": 60})
    assert info["budget"] == pytest.approx(0.3)
    assert env.reset()[1]["budget"] == 0.5


def test_drawn_budgets_fill_their_range_and_follow_the_seed():
    env = make(span=(0.3, 0.9))
    drawn = [env.reset(seed=0 if i == 0 else None)[1]["budget"] for i in range(200)]
    again = [env.reset(seed=0 if i == 0 else None)[1]["budget"] for i in range(200)]
    assert drawn == again
    assert 0.3 <= min(drawn) < 0.35
    assert 0.85 < max(drawn) <= 0.9
    assert env.reset(options={"budget": 0.5})[1]["budget"] == 0.5


@pytest.mark.parametrize("budget", [0, -0.5, 0.05, 1.5, 201, float("nan")])
def test_a_budget_that_cannot_be_is_refused_at_reset(budget):
    with pytest.raises(ValueError, match="budget"):
        make().reset(options={"budget": budget})


def test_an_unknown_reset_option_is_refused():
    with pytest.raises(ValueError, match="'budget'"):
        make().reset(options={"bugdet": 0.5})


@pytest.mark.parametrize("action", [np.array([np.nan]), np.array([0.1, 0.2]), np.array([])])
def test_an_action_that_is_not_one_finite_number_is_refused(action):
    env = make()
    env.reset()
    with pytest.raises(ValueError, match="one finite number"):
        env.step(action)


@pytest.mark.parametrize(("action", "channels"), [(-5.0, 1), (7.0, 4)])
def test_an_action_outside_the_box_is_moved_into_it(action, channels):
    assert play(make(budget=1.0), action)[0][-1]["channels"] == channels


def test_stepping_before_reset_or_after_the_end_is_refused():
    env = make()
    with pytest.raises(ResetNeeded):
        env.step(np.array([0.5]))
    play(env, 0.5, 0.5, 0.5)
    with pytest.raises(ResetNeeded):
        env.step(np.array([0.5]))


def test_an_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="rgb_array"):
        make(render_mode="human")


def test_rendering_follows_the_mode():
    text, picture = make(render_mode="ansi"), make(render_mode="rgb_array")
    for env in (text, picture):
        play(env, 0.5)
    assert isinstance(text.render(), str)
    assert picture.render().shape == (540, 960, 3)
    with pytest.raises(ResetNeeded):
        make(render_mode="ansi").render()


def test_importing_twice_registers_once():
    before = gymnasium.spec(ID)
    prune_env.register_environments()
    assert gymnasium.spec(ID) is before
    assert before.nondeterministic is False


def test_the_spec_is_json():
    spec = gymnasium.spec(ID)
    spec.kwargs |= {"task": "digits-cnn", "budget": 0.5, "leave": ["conv1"]}
    try:
        assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()).kwargs == spec.kwargs
    finally:
        spec.kwargs.clear()


def test_importing_the_package_does_not_import_torch():
    code = "import sys, prune_env; assert 'torch' not in sys.modules; assert 'trace' in dir(prune_env)"
    subprocess.run([sys.executable, "-c", code], check=True, env=contracts.environment(), timeout=60)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prune_env.no_such_name


FRESH = """
import gymnasium
env = gymnasium.make("prune_env:prune_env/ChannelPruning-v0", task="digits-cnn", budget=0.5, epochs=1)
env.reset(seed=0)
terminated = False
while not terminated:
    *_, terminated, _, info = env.step(env.action_space.sample())
assert info["budget_met"], info
assert gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()).kwargs["task"] == "digits-cnn"
"""

WORKERS = """
import sys
import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

def make():
    return gymnasium.make(
        "prune_env:prune_env/ChannelPruning-v0", task="digits-cnn", budget=0.5, budget_range=(0.3, 0.9), epochs=1
    )

if __name__ == "__main__":
    make()  # trains the dense network once, before two workers would
    played = []
    for envs in (DummyVecEnv([make] * 2), SubprocVecEnv([make] * 2, start_method=sys.argv[1])):
        envs.seed(3)
        steps = [envs.reset()]
        for step in range(20):
            seen, rewards, dones, infos = envs.step(np.full((2, 1), step / 20, dtype=np.float32))
            macs = np.array([info["macs"] for info in infos])
            # One of the two keeps rewards as float32, the other as float64.
            steps += [seen, {"reward": np.float32(rewards), "done": dones, "macs": macs}]
        envs.close()
        played.append(steps)
    for one, other in zip(*played, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
"""


@pytest.mark.slow
def test_make_works_from_a_fresh_interpreter(tmp_path):
    subprocess.run(
        [sys.executable, "-c", FRESH],
        check=True,
        cwd=tmp_path,
        timeout=200,
        env=contracts.environment(PRUNE_ENV_DATA=str(tmp_path)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_subprocess_workers_agree_with_the_same_envs_in_one_process(start_method, tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    subprocess.run(
        [sys.executable, "workers.py", start_method],
        check=True,
        cwd=tmp_path,
        timeout=280,
        env=contracts.environment(PRUNE_ENV_DATA=str(tmp_path)),
    )
