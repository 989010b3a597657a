"""Shapers: law 9 for each, every potential on three channels by hand, what is paid when, what is refused."""

from __future__ import annotations

import math
import time
from functools import cache

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env
from torch import nn

from agents.view import AgentView
from baselines import provable_filter_pruning, scop, shaping
from baselines.channel_gating_layers import ChannelGatedNetwork, GatedConvolution, Gating
from baselines.channel_gating_measurement import gated_energy
from baselines.directional_potential import excess, free_shares
from baselines.polarization_scales import margin
from baselines.potential import Potential, importance, kept
from baselines.provable_filter_pruning import ErrorBound
from baselines.scop import evidence, unlearned
from baselines.scop_layers import ControlledNetwork, writers_of
from baselines.shaping import SHAPERS, TERM, PotentialShaping, Shaping, potential_of
from prune_env.config import make_problem
from prune_env.envs import dynamics
from prune_env.envs.channel_pruning import ChannelPruningEnv
from prune_env.envs.dynamics import Problem
from tests import contracts
from tests.env.problems import chain, problem_of
from tests.methods.own_tasks import own_task


@cache
def problem(network: str = "residual") -> Problem:
    options = {"recalibrate": False, "refit": "none", "calibration_images": 32}
    return make_problem(own_task(network), budget=1.0, **options)


@cache
def toy() -> Problem:
    """Groups of 2, 3 and 4 channels that nothing is known of."""
    return problem_of(chain((2, 3, 4)), budget=0.8)


def shaped(over: Problem, name: str, *, weight: float = 1.0, discount: float = 1.0, **options) -> PotentialShaping:
    return PotentialShaping(ChannelPruningEnv(over), Shaping(name, weight, **options), discount=discount)


# --- the wrapper -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("name", SHAPERS)
def test_every_shaper_leaves_the_best_plan_alone(name: str, discount: float) -> None:
    env = shaped(problem(), name, weight=0.7, discount=discount)
    contracts.shaping_leaves_the_start_alone(ChannelPruningEnv(problem()), env, discount=discount, episodes=6)


@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=5, max_size=5), min_size=3, max_size=3),
    st.floats(-3, 3),
    st.floats(0.1, 5),
    st.floats(0.1, 1),
)
def test_any_potential_leaves_the_best_plan_alone(
    numbers: list[list[float]], start: float, weight: float, discount: float
) -> None:
    env = shaped(toy(), "importance", weight=weight, discount=discount)
    own = Potential(tuple(np.array(row, dtype=np.float64) for row in numbers))
    env.potential = lambda state: start + own(state)
    contracts.shaping_leaves_the_start_alone(ChannelPruningEnv(toy()), env, discount=discount, episodes=3)


def test_another_discount_than_the_agents_would_break_the_law() -> None:
    env = shaped(problem(), "importance", discount=0.9)
    with pytest.raises(AssertionError):
        contracts.shaping_leaves_the_start_alone(ChannelPruningEnv(problem()), env, discount=1.0, episodes=6)


def test_what_is_paid_by_hand() -> None:
    env = shaped(toy(), "importance", weight=2.0, discount=0.5)
    worth = iter([1.0, 3.0, -2.0])
    env.potential = lambda state: next(worth)  # of the start and of two states; not asked for the terminal one
    env.reset(options={"budget": 1.0})
    seen = [env.step(np.ones(1, dtype=np.float32)) for _ in range(3)]
    assert [info[TERM] for *_, info in seen] == [2 * (1.5 - 1), 2 * (-1 - 3), 2 * 2]
    assert [reward for _, reward, *_ in seen[:2]] == [1.0, -8.0]
    plain = sum(value for key, value in seen[2][4].items() if key.startswith("reward/") and key != TERM)
    assert seen[2][1] == plain + 4.0


def test_an_episode_that_is_cut_short_has_not_ended() -> None:
    env = PotentialShaping(TimeLimit(ChannelPruningEnv(toy()), 1), Shaping("importance"), discount=1.0)
    env.reset()
    *_, terminated, truncated, info = env.step(np.zeros(1, dtype=np.float32))
    assert (terminated, truncated) == (False, True)
    assert info[TERM] == env.potential(env.unwrapped.state) < 0


def test_the_weight_falls_from_episode_to_episode_and_never_within_one() -> None:
    fading = Shaping("importance", 0.8, 4)
    assert [fading.weight_at(episode) for episode in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    assert [Shaping("importance", 0.8).weight_at(episode) for episode in (0, 1000)] == [0.8, 0.8]
    env = shaped(toy(), "importance", weight=0.8, episodes=4)

    def paid(**options: int) -> list[float]:
        env.reset(options=options)
        return [env.step(np.zeros(1, dtype=np.float32))[4][TERM] for _ in range(3)]

    first, second = np.array(paid()), np.array(paid())
    assert (first != 0).all()
    assert second == pytest.approx(first * 3 / 4)
    assert paid(episode=3) == pytest.approx(first / 4)
    assert paid() == paid(episode=9) == [0, 0, 0]
    contracts.shaping_leaves_the_start_alone(ChannelPruningEnv(toy()), env, discount=1.0, episodes=2)


def test_the_environment_is_as_valid_as_before() -> None:
    env = shaped(toy(), "importance")
    with pytest.raises(ValueError, match="unknown"):
        env.reset(options={"budgt": 0.5})
    check_env(PotentialShaping(AgentView(ChannelPruningEnv(toy())), env.shaping, discount=1.0))


def test_evidence_is_collected_once_and_a_step_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [potential_of(name, problem()) for name in SHAPERS]
    monkeypatch.setattr(shaping, "SHAPERS", dict.fromkeys(SHAPERS))  # whoever collects again fails
    assert [potential_of(name, problem()) for name in SHAPERS] == before
    state = dynamics.start(problem())
    for _ in problem().steps:
        state = dynamics.apply(problem(), state, 0.5)
    for potential in before:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            potential(state)
            times.append(time.perf_counter() - begin)
        assert min(times) < 1e-3


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"shaper 'neuron_mergin' is unknown; did you mean 'neuron_merging'\? allowed"):
        Shaping("neuron_mergin")
    for weight in (0.0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="a finite number above 0 is allowed"):
            Shaping("scop", weight)
    with pytest.raises(ValueError, match="fades over 0 episodes; 1 or more"):
        Shaping("scop", 1.0, 0)
    for text in ("scop:", "scop:x", "scop:1:2.5", "scop:1:2:3", "scop:1:"):
        with pytest.raises(ValueError, match=r"shape is 'scop:.*NAME\[:WEIGHT\[:EPISODES\]\] is allowed"):
            Shaping.parse(text)
    assert Shaping.parse("scop") == Shaping("scop")
    assert Shaping.parse("scop:0.5") == Shaping("scop", 0.5)
    assert Shaping.parse("scop:2:100") == Shaping("scop", 2.0, 100)
    for discount in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="discount is"):
            shaped(toy(), "importance", discount=discount)
    with pytest.raises(ValueError, match=r"shaper 'polarization' does not fit own-.*no prunable group passes"):
        potential_of("polarization", problem("attention"))
    monkeypatch.setitem(SHAPERS, "importance", lambda problem: {})
    with pytest.raises(ValueError, match="does not fit toy: the potential is the same for every plan"):
        potential_of("importance", problem_of(chain((2, 3))))
    monkeypatch.setitem(SHAPERS, "importance", lambda problem: {"conv0": np.array([0, math.inf, 1])})
    with pytest.raises(ValueError, match="the potential of group 'conv0' is not finite"):
        potential_of("importance", problem_of(chain((2, 3))))


# --- potentials on three channels by hand ----------------------------------------------------------------------------


def test_curves_become_a_potential_between_the_whole_plan_and_the_worst() -> None:
    curves = {"conv0": np.array([9.0, 1, 3]), "conv1": np.array([9.0, 5, 6, 4])}  # of conv2 nothing is known
    potential = Potential.of(toy(), curves)
    # spreads 2 and 2; whole 3 and 4
    state = dynamics.start(toy(), 1.0)
    assert potential(state) == 0
    for counts, worth in (((1,), -0.5), ((1, 2), -0.5 + 0.5), ((2, 1, 1), 0.25), ((2, 3, 4), 0.0)):
        assert potential(dynamics.State(state.budget, counts)) == pytest.approx(worth)


@pytest.mark.parametrize("name", SHAPERS)
def test_every_potential_begins_at_zero_and_stays_within_one(name: str) -> None:
    potential, rng = potential_of(name, problem()), np.random.default_rng(0)
    assert potential(dynamics.start(problem())) == 0
    drawn = []
    for _ in range(50):
        counts = tuple(int(rng.choice(levels)) for levels in problem().allowed)
        drawn.append(potential(dynamics.State(dynamics.start(problem()).budget, counts)))
        whole = dynamics.State(dynamics.start(problem()).budget, problem().channels)
    assert potential(whole) == pytest.approx(0)
    assert np.ptp(drawn) > 0.05
    assert np.abs(drawn).max() <= 1 + 1e-9


def test_importance_by_hand() -> None:
    assert kept(np.array([3.0, 1.0, 0.0])).tolist() == [0, 0.75, 1, 1]
    assert kept(np.zeros(3)).tolist() == [0, 0, 0, 0]
    over = problem_of(chain((3, 3)))
    over.scores["conv0"][:] = [1, 2, 5]
    over.scores["conv1"][:] = [-1, 1, 0]  # less the least: 0, 2, 1
    curves = importance(over)
    assert curves["conv0"].tolist() == [0, 5 / 8, 7 / 8, 1]
    assert curves["conv1"].tolist() == [0, 2 / 3, 1, 1]


def test_separability_by_hand() -> None:
    assert margin(np.array([0.8, 0.6, 0.2])) == pytest.approx([-1, 0.25, 0.5, 0])
    assert margin(np.array([0.2, 0.8, 0.6])) == pytest.approx([-1, -0.75, -0.5, 0])
    assert margin(np.array([1.0, 1.0, 0.0])).tolist() == [-1, 0, 1, 0]  # the poles
    assert margin(np.zeros(3)).tolist() == [-1, 0, 0, 0]


def test_evidence_kept_by_hand() -> None:
    assert evidence(np.array([0.6, -0.5, 0.2])) == pytest.approx([0, 0.75, -0.25, 0])
    assert evidence(np.array([0.6, 0.2, -0.5])) == pytest.approx([0, 0.75, 1, 0])
    assert evidence(np.array([0.5, 0.5, 0.0])).tolist() == [0, 0.5, 1, 1]


def test_unlearned_evidence_is_the_slope_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scop, "permuted", lambda images: images.flip(0))
    over = problem()
    network, images = over.evaluator.network, over.evaluator.calibration
    found = unlearned(over)
    controlled = ControlledNetwork(network, writers_of(over.graph), control=scop.permuted).train().double()
    labels = network(images).argmax(1)

    def loss(group: str, channel: int, step: float) -> float:
        (slot,) = over.graph.group(group).producers
        beta = controlled.selections[controlled.writers.index(slot.module)].beta
        with torch.no_grad():
            beta[channel] += step
            value = nn.functional.cross_entropy(controlled(images.double()), labels, reduction="sum")
            beta[channel] -= step
        return float(value)

    scales = network.get_submodule("one.0.1").weight.detach().abs().double().numpy()
    slopes = scales * [(loss("one.0.0", c, 1e-4) - loss("one.0.0", c, -1e-4)) / 2e-4 for c in range(len(scales))]
    assert np.count_nonzero(slopes) >= 3
    unit = found["one.0.0"][np.abs(slopes).argmax()] / -slopes[np.abs(slopes).argmax()]
    assert unit > 0
    assert found["one.0.0"] == pytest.approx(-slopes * unit, rel=1e-3, abs=1e-6)


def test_error_bounds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = ErrorBound(np.array([0.5, 0.25, 0.25]))
    monkeypatch.setattr(provable_filter_pruning, "bounds", lambda problem: {"conv0": bound})
    curve = provable_filter_pruning.error_bounds(toy())["conv0"]
    a = 6 * math.log(16e16)  # S = 1, C = 3, P = k = 1
    # one draw hits one channel; two are hit by m draws with 3 - .5^m - 2 .75^m = 2, solved by bisection elsewhere
    m = bound.needed[2]
    assert 3 - 0.5**m - 2 * 0.75**m == pytest.approx(2)
    errors = [3 * a / m + math.sqrt((3 * a / m) ** 2 + 18 * a / m) for m in (1.0, m)]
    assert curve == pytest.approx([-math.inf, -math.log1p(errors[0]), -math.log1p(errors[1]), 0])


def test_pruning_beyond_the_free_directions_by_hand() -> None:
    norms = {"a": np.array([3.0, 1.0, 2.0]), "b": np.array([4.0, 5.0])}
    assert free_shares(norms, share=0.4) == {"a": 2 / 3, "b": 0}
    assert free_shares({"a": np.array([0.0, 1.0, 2.0]), "b": np.array([4.0, 0.0])}) == {"a": 1 / 3, "b": 1 / 2}
    assert excess(3, free=1 / 3, macs=9.0) == pytest.approx([-6, -3, 0, 0])
    assert excess(3, free=0.0, macs=9.0) == pytest.approx([-9, -6, -3, 0])


def test_gated_energy_by_hand() -> None:
    convolution, norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3, eps=0.0)
    layer = GatedConvolution(convolution, norm, Gating(parts=2, base="first")).eval()
    with torch.no_grad():
        layer.convolution.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 2.0], [1.0, 3.0]]).view(3, 2, 1, 1))
        layer.gate.threshold.zero_()
    gated = ChannelGatedNetwork(nn.Sequential(layer), chain((3,)), ("0",), {}).eval()
    # Y_p = 1, -1, 1 and -1, 1, -1; Y_r = 2, 4, 6: gates 1, 0, 1 and 0, 1, 0
    images = torch.tensor([[1.0, 2.0], [-1.0, 2.0]]).view(2, 2, 1, 1)
    assert gated_energy(gated, images)["0"].tolist() == [2, 8, 18]
    assert kept(np.array([18.0, 2.0, 8.0])) == pytest.approx([0, 18 / 28, 20 / 28, 1])


def test_a_gate_that_never_opens_wants_nothing() -> None:
    curves = SHAPERS["channel_gating"](problem())
    assert curves.keys() < {group.name for group in problem().graph.groups}  # the first convolution has no gate
    assert all(curve[-1] == 1 for curve in curves.values())
