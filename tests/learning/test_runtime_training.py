"""Runtime training: views, policies, stages, and the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import evaluate, runtime_options, runtime_train
from agents.cli import BAD_INPUT, guarded
from agents.runtime_agent import AgentDecisions, PpoSettings, make_agent, restore, static_keeps, tensors_of
from agents.runtime_options import RuntimeTrainConfig, Schedule
from agents.runtime_stages import RuntimeLearner
from agents.runtime_view import RuntimeView, StaticView
from prune_env.envs.runtime_dynamics import IMAGE_FIELDS
from prune_env.envs.runtime_pruning import RuntimePruningVectorEnv
from prune_env.pruning.gating.measurement import Recorder

TINY = Schedule(gates=1, scores=1, rounds=1, rollouts=2, network=1, final=1, ppo=PpoSettings(epochs=1))


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


def test_one_command_trains_and_reports(tmp_path, capsys):
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
