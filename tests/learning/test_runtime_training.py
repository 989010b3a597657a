"""Runtime training: views, policies, stages, and the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecMonitor

from agents import evaluate, runtime_evaluate, runtime_options, runtime_stages, runtime_train
from agents.cli import BAD_INPUT, guarded
from agents.runtime_agent import (
    AgentDecisions,
    DrawnBudgets,
    MeanActions,
    PpoSettings,
    make_agent,
    restore,
    static_keeps,
    tensors_of,
)
from agents.runtime_options import RuntimeTrainConfig, Schedule
from agents.runtime_report import RuntimeReporter
from agents.runtime_stages import RuntimeLearner, Stage
from agents.runtime_view import RuntimeView, StaticView
from prune_env.envs.runtime_dynamics import IMAGE_FIELDS, RuntimeProblem
from prune_env.envs.runtime_pruning import RuntimePruningVectorEnv
from prune_env.pruning.gating.layer import Question
from prune_env.pruning.gating.measurement import Recorder
from prune_env.tasks.training.loop import TrainReport

TINY = Schedule(gates=1, scores=1, rounds=1, rollouts=2, network=1, final=1, ppo=PpoSettings(epochs=1))


GATELESS = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes)
    )
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Seconds instead of minutes, and a cache of its own."""
    monkeypatch.setitem(runtime_options.SCHEDULES, "digits", TINY)
    torch.set_num_threads(1)


CONFIG = RuntimeTrainConfig(epochs=0, images_at_once=16, static_batches=4, threads=1)


@pytest.fixture
def learner(tmp_path):
    return RuntimeLearner(runtime_train.task_of(CONFIG), CONFIG, tmp_path)


def test_an_action_of_zero_keeps_the_even_share(learner):
    problem = dataclasses.replace(learner.problem, span=None, static_keeps=(1.0,) * len(learner.problem.channels))
    view = RuntimeView(RuntimePruningVectorEnv(problem, num_envs=4))
    view.seed(0)
    seen = view.reset()
    view.step(np.zeros((4, 1)))
    even = problem.even_keep(learner.budget)
    np.testing.assert_allclose(seen["even"], even, rtol=1e-6)
    np.testing.assert_allclose(view.env._passage.keeps[0], even, rtol=1e-6)


def test_a_price_rises_while_images_cost_more_than_the_budget(learner):
    problem = dataclasses.replace(learner.problem, span=None, trust=1.0)
    view = RuntimeView(RuntimePruningVectorEnv(problem, num_envs=4), price=1.0)
    view.seed(0)
    view.reset()
    for _ in problem.channels:
        _, rewards, over, told = view.step(np.ones((4, 1)))
    assert over.all()
    assert view.price > 1.0
    excess = np.array([one["macs"] for one in told]) - learner.budget.fraction
    assert view.price == pytest.approx(1.0 + RuntimeView.RATE * excess.mean())
    assert all(one["episode"]["r"] == pytest.approx(r) for one, r in zip(told, rewards, strict=True))


def played(view, act, *, change):
    """Rewards of one episode by an agent's mean actions, all changed by a number, and what was told at its end."""
    view.seed(1)
    seen = view.reset()
    for _ in view.env.problem.channels:
        seen, rewards, _, told = view.step(act(0, seen) + change)
    return rewards, told


@pytest.mark.parametrize("price", [None, 2.0])
@pytest.mark.parametrize("trust", [0.5, 1.0])
def test_mean_decisions_are_the_zero_of_rewards(learner, price, trust):
    learner.price, problem = price, dataclasses.replace(learner.problem, trust=trust)
    view, _ = learner._views(problem, None if trust == 1 else learner.statics())
    rewards, told = played(view, MeanActions(learner.runtime), change=0.0)
    np.testing.assert_array_equal(rewards, 0.0)
    assert all(one["episode"]["r"] < 0 for one in told)


def test_rewards_are_what_actions_win_over_the_mean_decisions(learner):
    learner.price, act = 0.0, MeanActions(learner.runtime)
    view, _ = learner._views(dataclasses.replace(learner.problem, trust=1.0), None)
    won, told = played(view, act, change=-0.2)
    view.means, view.price = None, 0.0
    paid, plain = played(view, act, change=-0.2)
    view.price = 0.0
    by_means, _ = played(view, act, change=0.0)
    assert [one["episode"] for one in told] == [one["episode"] for one in plain]
    # Losses under the means, relative to the mean loss of the other episode: the same up to a factor.
    factors = (won - paid) / -by_means
    assert factors[0] != pytest.approx(1.0)
    np.testing.assert_allclose(factors, factors[0], rtol=1e-3)


def test_the_static_agent_never_sees_an_image(learner):
    view = StaticView([RuntimePruningVectorEnv(learner.problem, num_envs=4) for _ in range(2)], None)
    assert not set(view.observation_space.spaces) & set(IMAGE_FIELDS)
    first, second = (static_keeps(learner.static, learner.problem, learner.budget) for _ in range(2))
    assert first == second


def test_static_decisions_are_the_same_for_all_inputs(learner):
    fixed = dataclasses.replace(learner.problem, static_keeps=learner.statics())
    removed = []
    for images in learner.problem.images[:32].split(16):
        recorder = Recorder(AgentDecisions(fixed, learner.runtime, budget=learner.budget), len(fixed.channels))
        learner.gated.decide = recorder
        with torch.no_grad():
            learner.gated(images)
        removed.append([passage_kept for passage_kept in recorder.decide.passage.kept])
    learner.gated.decide = None
    assert removed[0] == removed[1]


def test_agents_decide_in_float32_whatever_the_network_runs_in(learner):
    decide = AgentDecisions(dataclasses.replace(learner.problem, static_keeps=learner.statics()), learner.runtime)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            learner.gated.decide = decide
            learner.gated(learner.problem.images[:4])
        found.append(decide.passage.keeps[0])
    learner.gated.decide = None
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_the_views_are_vector_envs_as_stable_baselines_wants_them(learner, trust):
    problem = dataclasses.replace(learner.problem, trust=trust)
    layers = len(problem.channels)

    def views():
        yield RuntimeView(RuntimePruningVectorEnv(problem, num_envs=4))
        yield StaticView([RuntimePruningVectorEnv(problem, num_envs=3) for _ in range(4)], None)

    for view, twin in zip(views(), views(), strict=True):
        assert isinstance(view, VecEnv)
        watched = VecMonitor(VecCheckNan(view, raise_exception=True))
        watched.seed(3)
        twin.seed(3)
        rng, seen, other = np.random.default_rng(0), watched.reset(), twin.reset()
        for step in range(2 * layers):
            for name, space in view.observation_space.items():
                assert seen[name].shape == (4, *space.shape)
                assert seen[name].dtype == space.dtype
                assert all(space.contains(row) for row in seen[name])
                np.testing.assert_array_equal(seen[name], other[name])
            actions = rng.uniform(-1, 1, (4, 1)).astype(np.float32)
            assert view.action_space.contains(actions[0])
            seen, rewards, over, told = watched.step(actions)
            other, expected, *_ = twin.step(actions)
            assert (rewards.shape, rewards.dtype) == ((4,), np.float32)
            np.testing.assert_array_equal(rewards, expected)
            assert (over.shape, over.dtype, len(told)) == ((4,), bool, 4)
            assert over.all() == over.any() == ((step + 1) % layers == 0)
            for one, reward in zip(told, rewards, strict=True):
                assert ("terminal_observation" in one) == ("episode" in one) == over[0]
                if over[0]:
                    assert view.observation_space.contains(one["terminal_observation"])
                    assert one["episode"]["r"] == pytest.approx(reward, rel=1e-5)
                    assert one["episode"]["l"] == layers
        assert watched.env_is_wrapped(VecMonitor) == [False] * 4
        assert view.get_attr("num_envs") == [4] * 4
        assert view.get_attr("num_envs", indices=[1, 2]) == [4] * 2
        view.set_attr("mark", 7)
        assert view.get_attr("mark") == [7] * 4


def test_a_network_without_a_layer_that_can_carry_a_gate_is_refused_by_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "gateless.py").write_text(GATELESS)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--task", "digits", "--network", "gateless:make", "--epochs", "0", "--runs", str(tmp_path / "runs")]
    assert guarded(lambda: runtime_train.main(arguments)) == BAD_INPUT
    said = capsys.readouterr().err
    assert "no layer that can carry a gate" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_share_is_not_refused_for_a_budget_that_was_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(RuntimeProblem, "minimum", property(lambda problem: 0.6 * problem.accounting.dense_macs))
    config = dataclasses.replace(CONFIG, keep=0.9)
    learner = RuntimeLearner(runtime_train.task_of(config), config, tmp_path)
    assert learner.budget.fraction > 0.6
    with pytest.raises(ValueError, match=r"budget 0\.5"):
        RuntimeLearner(learner.task, CONFIG, tmp_path)


def test_a_run_folder_with_a_trust_that_is_no_share_is_corrupt(tmp_path, capsys):
    (tmp_path / "config.json").write_text(CONFIG.to_json().replace('"runtime_trust": 0.5', '"runtime_trust": 1.5'))
    assert guarded(lambda: runtime_train.main(["--resume", str(tmp_path)])) == BAD_INPUT
    assert "runtime_trust is 1.5" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [-0.3, 0.0, 0.4])
def test_static_shares_alone_meet_the_budget_within_a_channel(tmp_path, bias):
    config = dataclasses.replace(CONFIG, runtime_trust=0.0)
    learner = RuntimeLearner(runtime_train.task_of(config), config, tmp_path)
    with torch.no_grad():
        learner.static.policy.action_net.bias.fill_(bias)
        learner.static.policy.action_net.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    problem, limit = learner.problem, learner.budget.limit
    rows = RuntimeReporter(learner.task, learner, tmp_path, lambda *_: None).rows()
    assert list(rows) == ["dense", "open", "learned", "even"]
    assert len(set(rows["even"]["static_keep"])) == 1
    assert len(set(rows["learned"]["static_keep"])) > 1
    for name in ("learned", "even"):
        shares = np.array(rows[name]["static_keep"])
        counts = np.round(shares * problem.channels).astype(int)
        more = np.minimum(counts + 1, problem.channels)
        assert float(problem.accounting.macs(counts, counts)) <= limit < float(problem.accounting.macs(more, more))
        for split in ("search", "test"):
            assert rows[name][split]["dynamic_macs"] == float(problem.accounting.macs(counts, counts))
            assert rows[name][split]["dynamic_macs_spread"] == 0
    assert learner.decisions().problem.static_keeps == learner.statics() == tuple(rows["learned"]["static_keep"])


def test_an_agent_comes_back_from_its_tensors(learner):
    view, _ = learner._views(learner.problem, learner.statics())
    layers = len(learner.problem.channels)
    agent = make_agent("runtime", view, layers, TINY.ppo, seed=0)
    agent.learn(layers * 16)
    other = make_agent("runtime", view, layers, TINY.ppo, seed=5)
    restore(other, tensors_of(agent))
    for name, value in tensors_of(agent).items():
        assert torch.equal(value, tensors_of(other)[name]), name
    with pytest.raises(ValueError, match="does not fit"):
        restore(other, {"policy/nothing": torch.zeros(1)})


def test_the_range_regulariser_takes_the_place_of_the_entropy(learner):
    agent = learner.runtime
    seen = {name: np.zeros((3, *space.shape), np.float32) for name, space in agent.observation_space.items()}
    seen["index"][:, 0] = 1.0
    seen["even"][:, 0] = (0.5, 1.5, 0.0)
    tensors, _ = agent.policy.obs_to_tensor(seen)
    with torch.no_grad():
        agent.policy.action_net.weight.zero_()
        agent.policy.action_net.bias.zero_()
    states = agent._last_lstm_states.__class__(*((torch.zeros(1, 3, 128), torch.zeros(1, 3, 128)) for _ in range(2)))
    _, _, minus = agent.policy.evaluate_actions(tensors, torch.zeros(3, 1), states, torch.zeros(3))
    # smooth L1 of 0, .5 and .1: 0, .125 and .005
    np.testing.assert_allclose(minus.detach().numpy(), [0.0, -0.125, -0.005], atol=1e-6)


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_static_scores_that_decide_start_from_the_scales(tmp_path, monkeypatch, trust):
    config = dataclasses.replace(CONFIG, runtime_trust=trust)
    learner = RuntimeLearner(runtime_train.task_of(config), config, tmp_path)
    scales = [1 + torch.rand(layer.channels) for layer in learner.gated.layers]
    for layer, scale in zip(learner.gated.layers, scales, strict=True):
        layer.gate.bias.data.copy_(scale)
    widths = []
    monkeypatch.setattr(
        runtime_stages, "train_gated", lambda net, *_, **__: widths.append(net.full) or TrainReport((0.0,), (0.0,))
    )
    for at, kind in enumerate(("gates", "scores", "network")):
        learner._network(Stage(kind, 1), at, lambda *_: None)
    for scale, score in zip(scales, learner.gated.static.scores(), strict=True):
        shared = (scale.abs() / scale.abs().mean()).sqrt().clamp_min(0.1)
        torch.testing.assert_close(score.detach(), torch.ones_like(scale) if trust == 1 else shared)
    # What is removed for good is left out of the network's stage, and of no other.
    whole = learner.gated.full
    assert [(width < whole).any() for width in widths] == [False, False, trust < 1]


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_goes_on_where_it_was_stopped(tmp_path, after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    task = runtime_train.task_of(CONFIG)
    RuntimeLearner(task, CONFIG, whole).run(lambda *_: None, lambda *_: None)

    def stop(at, figures):
        if at == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RuntimeLearner(task, CONFIG, parts).run(lambda *_: None, stop)
    RuntimeLearner(task, CONFIG, parts).run(lambda *_: None, lambda *_: None)
    expected, found = load_file(whole / "checkpoint.safetensors"), load_file(parts / "checkpoint.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_one_command_trains_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime_evaluate, "TIMED", 2)
    arguments = ["--epochs", "0", "--images-at-once", "16", "--static-batches", "4", "--threads", "1"]
    assert runtime_train.main([*arguments, "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "learned" in said
    assert "even" in said
    run = next(tmp_path.iterdir())
    assert {"config.json", "checkpoint.safetensors", "report.json", "tensorboard"} <= {f.name for f in run.iterdir()}
    with pytest.raises(ValueError, match="already exists"):
        runtime_train.main([*arguments, "--runs", str(tmp_path)])
    assert runtime_train.main(["--resume", str(run)]) == 0
    assert evaluate.main([str(run)]) == 0
    assert "the record agrees" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert list(report) == ["dense", "open", "learned", "same", "mean", "even"]
    assert set(report["same"]["test"]["varying_channels"]) == {0.0}
    assert report["same"]["search"]["dynamic_macs"] <= report["mean"]["search"]["dynamic_macs"] * 1.05
    report["learned"]["test"]["accuracy"] += 0.01
    (run / "report.json").write_text(json.dumps(report))
    assert evaluate.main([str(run)]) == 1
    (run / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="corrupt"):
        runtime_train.main(["--resume", str(run)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime-trust", "1.5"], "runtime_trust is 1.5"),
        (["--runtime-trust", "-0.1"], "runtime_trust is -0.1"),
        (["--runtime-trust", "nan"], "runtime_trust is nan"),
        (["--epochs", "0", "--keep", "0.01"], "is the smallest keep allowed"),
        (["--epochs", "0", "--keep", "0.01", "--runtime-trust", "0"], "is the smallest keep allowed"),
        (["--budget", "0"], "budget is 0"),
        (["--epochs", "0", "--budget", "0.001"], "is the smallest share allowed"),
        (["--schedule", "papr"], "did you mean 'paper'"),
        (["--static-importance", "vektor"], "did you mean 'vector'"),
        (["--keep", "1.2"], "keep is 1.2"),
        (["--images-at-once", "10"], "a divisor of images_at_once"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message):
    runs = tmp_path / "runs"
    assert guarded(lambda: runtime_train.main([*arguments, "--runs", str(runs)])) == BAD_INPUT
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not runs.exists()


def test_the_network_can_be_trained_at_drawn_budgets():
    asked = []

    def at(budget):
        asked.append(budget)
        return lambda question: torch.tensor(budget)

    def answers(batches):
        torch.manual_seed(4)
        decide = DrawnBudgets(at, (0.2, 0.6))
        nothing = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)
        asked_in_turn = [Question("layer", index, *nothing) for index in range(3)]
        return [[float(decide(question)) for question in asked_in_turn] for _ in range(batches)]

    first = answers(50)
    assert all(len(set(batch)) == 1 for batch in first)  # one budget for all layers
    assert 0.2 <= min(asked) < 0.25
    assert 0.55 < max(asked) <= 0.6
    assert answers(50) == first


@pytest.mark.slow
def test_a_run_whose_network_serves_several_budgets_resumes_exactly(tmp_path):
    config = dataclasses.replace(CONFIG, network_spread=0.3)
    whole, parts = (RuntimeLearner(runtime_train.task_of(config), config, tmp_path / name) for name in ("a", "b"))
    for learner in (whole, parts):
        learner.folder.mkdir()
    whole.run(lambda *_: None, lambda *_: None)

    class Killed(Exception):
        pass

    def kill(at, _):
        if at == 2:
            raise Killed

    with pytest.raises(Killed):
        parts.run(lambda *_: None, kill)
    again = RuntimeLearner(runtime_train.task_of(config), config, tmp_path / "b")
    again.run(lambda *_: None, lambda *_: None)
    for name, tensor in whole.gated.state_dict().items():
        assert torch.equal(tensor, again.gated.state_dict()[name]), name
