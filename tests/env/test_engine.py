"""The deployed network: skipping gives what closing gates gives, costs what the accounting says, and can be stored."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import prune_env
from benchmarks.subjects import random_policy
from prune_env.pruning.engine import grouped
from prune_env.pruning.engine.deployed import DeployedNetwork, deploy
from prune_env.pruning.engine.grouped import run_grouped
from prune_env.pruning.gating.accounting import Accounting
from prune_env.pruning.gating.fixed import FixedDecisions
from prune_env.pruning.gating.stored import plan_of, static_decisions, stored_inputs
from prune_env.pruning.measure import count_params
from prune_env.pruning.plan import Plan
from tests.env.deployed_networks import (
    NATIVE,
    OTHERS,
    assert_same,
    choices,
    deployed,
    gated_of,
    inputs,
    one_by_one,
    rectified,
    shares,
)
from tests.env.gated_networks import GATEABLE

ALL = (*GATEABLE, *NATIVE, *OTHERS)
KEEPS = (0.5, 0.2, 0.9, 1.0)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "trust"),
    [
        *((name, 0.5) for name in ALL),
        *(
            pytest.param(name, end, marks=[] if name in GATEABLE else [pytest.mark.slow])
            for name in ALL
            for end in (0.0, 1.0)
        ),
    ],
)
def test_skipping_gives_what_closing_gates_gives(name: str, trust: float) -> None:
    x = inputs(3)
    for keep in KEEPS if name in GATEABLE else KEEPS[:2]:
        network = deployed(name, keep, trust)
        expected = network.masked(x)
        assert_same(one_by_one(network, x), expected)
        assert_same(run_grouped(network, x, worth=0), expected)
    assert_same(network.run(x), expected)
    assert_same(run_grouped(network, x), expected)


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_closing_gates_gives_what_the_uncut_network_gives(name: str, trust: float) -> None:
    gated, x, active = copy.deepcopy(gated_of(name)), inputs(3), []
    decide = shares(gated, 0.6, trust, 0.4)
    gated.decide = lambda question: active.append(decide(question)) or active[-1]
    with torch.no_grad():
        outputs = gated(x)
    network, expected = deploy(gated, decide), (outputs, torch.stack([mask.sum(1) for mask in active], dim=1))
    assert_same(network.masked(x), expected)
    assert_same(network.run(x[:1]), tuple(part[:1] for part in expected))


@pytest.mark.parametrize("name", ALL)
def test_these_inputs_choose_different_channels(name: str) -> None:
    assert any((active != active[:1]).any() for active in choices(deployed(name), inputs(3)))


@pytest.mark.parametrize("name", ["chain", "joined", "wide", "flat"])
def test_what_is_never_active_is_gone(name: str) -> None:
    """At trust R, the floor of (1 - R) of the channels outside the static top are cut, lowest scores first."""
    gated = gated_of(name)
    full = gated.full
    for trust in (0.0, 0.5, 1.0):
        network = deploy(gated, shares(gated, 0.4, trust))
        left = full - np.floor((1 - trust) * (full - np.round(0.4 * full)) + 1e-9).astype(int)
        assert [layer.producer.weight.shape[0] for layer in network.layers] == left.tolist()
        plan = plan_of(gated, static_decisions(gated, (0.4,) * len(full), trust))
        for key, score, layer, count in zip(gated.names, gated.static.scores(), network.layers, left, strict=True):
            best = score.detach().argsort(descending=True)[:count].sort().values
            assert torch.equal(torch.tensor(plan.keep[key]), best)
            assert layer.gate.weight.shape[0] == layer.shift.numel() == count
        cut = gated.cut(plan)
        assert [p.shape for p in network.network.parameters()] == [p.shape for p in cut.network.parameters()]


@pytest.mark.parametrize("name", ["chain", "joined", "kernels", "enclosed"])
def test_it_costs_what_the_accounting_says(name: str) -> None:
    gated, rng = gated_of(name), np.random.default_rng(0)
    forms = Accounting.of(gated)
    for trust in (0.0, 0.5, 1.0):
        network = deploy(gated, shares(gated, 0.5, trust))
        kept = np.array([layer.channels for layer in network.layers])
        counts = network.run(inputs())[1]
        np.testing.assert_allclose(network.macs(counts), forms.macs(counts.numpy(), kept), rtol=1e-12)
        assert count_params(network) == forms.params(kept)
        random = rng.integers(0, kept + 1, size=(20, len(kept)))
        for known in range(len(kept) + 1):
            so_far = np.where(np.arange(len(kept)) < known, random, 0)
            stored = np.where(np.arange(len(kept)) < known, kept, 0)
            found = network.costs.macs([torch.from_numpy(column) for column in random.T[:known]])
            np.testing.assert_allclose(np.broadcast_to(found, 20), forms.macs(so_far, stored), rtol=1e-12)
    assert (network.costs.dense_macs, network.costs.dense_params) == (forms.dense_macs, forms.dense_params)


@pytest.mark.parametrize("trust", [0.5, 1.0])
@pytest.mark.parametrize("name", ["chain", "shuffled", "joined", "kernels", "wide", "tokens", "branching"])
def test_an_agent_decides_alike_wherever_the_network_runs(name: str, trust: float) -> None:
    network, x = deployed(name, 0.5, trust, agent=True), inputs(8)
    expected = network.masked(x)
    assert (expected[1] != expected[1][:1]).any(), "the agent asks the same for every input"
    assert_same(network.run(x), expected)
    assert_same(one_by_one(network, x.flip(0)), tuple(part.flip(0) for part in expected))
    assert_same(run_grouped(network, x, worth=0), expected)


def test_an_agent_sees_what_the_static_cut_leaves_and_stays_the_caller_s() -> None:
    gated = gated_of("joined")
    decide = shares(gated, 0.5, 0.0)
    decisions = static_decisions(gated, decide.static_keeps, decide.trust)
    policy = random_policy(gated, decide, even=0.5, hidden=4)
    network = deploy(gated, decide, policy)
    assert [len(seat.pooled) for seat in policy.seats] == [layer.gate.in_features for layer in network.layers]
    assert [len(used) for used in stored_inputs(gated, decisions)] == [len(seat.pooled) for seat in policy.seats]
    network.to(torch.bfloat16)
    assert policy.head.dtype == torch.float32
    assert network.costs.weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["chain", "joined"])
def test_torch_s_operations_compute_no_inactive_channel_and_read_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights of NaN there, and by the weights that each operation is given."""
    network, x = deployed(name), inputs(1)
    expected = run_grouped(network, x, worth=0)
    active = [mask[0] for mask in choices(network, x)]
    found, operation = [], grouped._operation

    def watched(module: torch.nn.Module) -> object:
        def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            found.append((module, tuple(weight.shape[:2])))
            return operation(module)(x, weight, bias)

        return run

    with torch.no_grad():
        for layer, mask in zip(network.layers, active, strict=True):
            layer.producer.weight[~mask] = torch.nan
        for reader, at, index, unit in network.reads:
            module = network.network.get_submodule(reader)
            module = getattr(module, "producer", module)
            closed = ~active[at] if index is None else torch.tensor(index)[~active[at][list(unit)]]
            module.weight[:, closed] = torch.nan
    monkeypatch.setattr(grouped, "_operation", watched)
    outputs, counts = run_grouped(network, x, worth=0)
    assert torch.equal(outputs, expected[0])
    widths = {layer.producer: int(mask.sum()) for layer, mask in zip(network.layers, active, strict=True)}
    assert all(shape[0] == widths[module] for module, shape in found if module in widths)
    read: dict[torch.nn.Module, int] = {}
    for reader, at, index, unit in network.reads:
        module = network.network.get_submodule(reader)
        module = getattr(module, "producer", module)
        read[module] = read.get(module, 0) + int(active[at].sum() if index is None else active[at][list(unit)].sum())
    assert {module: shape[1] for module, shape in found if module in read} == read
    assert torch.equal(counts, expected[1])


def stored(kind: str) -> DeployedNetwork:
    return {
        "fixed": lambda: deployed("joined", 0.5, 0.5),
        "agent": lambda: deployed("chain", 0.5, 0.5, agent=True),
        "rectified": lambda: rectified("residual"),
        "inplace": lambda: deployed("inplace"),
    }[kind]()


@pytest.mark.parametrize("kind", ["fixed", "agent", "rectified", "inplace"])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(kind: str, tmp_path: Path) -> None:
    network, x = stored(kind), inputs()
    network.run(x)  # nothing of a program is stored
    prune_env.save(network, Plan({}), tmp_path / "net")
    loaded = prune_env.load(tmp_path / "net")
    for found, expected in (
        (loaded.run(x), network.run(x)),
        (loaded.masked(x), network.masked(x)),
        (run_grouped(loaded, x), run_grouped(network, x)),
    ):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert torch.equal(loaded.macs(found[1]), network.macs(found[1]))
    assert_same(network.run(x), network.masked(x))


@pytest.mark.parametrize("file", ["model.safetensors", "network.json"])
def test_a_file_that_was_changed_is_refused(file: str, tmp_path: Path) -> None:
    prune_env.save(deployed("chain"), Plan({}), tmp_path / "net")
    content = bytearray((tmp_path / "net" / file).read_bytes())
    content[-20] ^= 1
    (tmp_path / "net" / file).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        prune_env.load(tmp_path / "net")


@pytest.mark.slow
def test_another_process_loads_and_runs_it(tmp_path: Path) -> None:
    network, x = stored("agent"), inputs()
    prune_env.save(network, Plan({}), tmp_path / "net")
    outputs, counts = network.run(x)
    safetensors.torch.save_file({"x": x, "outputs": outputs.clone(), "counts": counts}, tmp_path / "facts")
    code = """if True:
        import sys, torch, prune_env, safetensors.torch
        network, facts = prune_env.load(sys.argv[1], allow="tests"), safetensors.torch.load_file(sys.argv[2])
        torch.set_num_threads(1)
        outputs, counts = network.run(facts["x"])
        assert torch.equal(outputs, facts["outputs"]) and torch.equal(counts, facts["counts"])
    """
    command = (sys.executable, "-c", code, str(tmp_path / "net"), str(tmp_path / "facts"))
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_and_shares_that_are_not_allowed_are_refused() -> None:
    network, gated = deployed("chain"), gated_of("chain")
    assert network.eval() is network.train(False) is network
    with pytest.raises(ValueError, match="for inference; train the gated network"):
        network.train()
    for wrong in (-0.5, 0.0, 1.5):
        with pytest.raises(ValueError, match=f"keep is {wrong}"):
            deploy(gated, shares(gated, 0.5, 0.5, wrong))
    with pytest.raises(ValueError, match="runtime_trust is 2"):
        FixedDecisions((0.5,) * 3, trust=2)


@pytest.mark.parametrize("name", ["inplace", "chain", "enclosed"])
def test_nothing_of_the_caller_s_is_disturbed(name: str) -> None:
    gated = copy.deepcopy(gated_of(name)).train()
    before = {key: value.clone() for key, value in gated.state_dict().items()}
    network, x = deploy(gated, shares(gated, 0.5, 0.5)), inputs()
    assert gated.training
    assert all(parameter.requires_grad for parameter in gated.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    caller, random = x.clone().requires_grad_(), torch.get_rng_state()
    for run in (network.run, network.masked, lambda x: run_grouped(network, x), lambda x: one_by_one(network, x)):
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.clone(memory_format=layout)
            run(given)
            assert torch.equal(given, x)
            assert not run(caller)[0].requires_grad
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in gated.state_dict().items())
    caller.sum().backward()
    assert all(layer._turn is None and "forward" not in layer.__dict__ for layer in network.layers)


def test_a_lower_number_format_runs_under_autocast() -> None:
    for name in ("chain", "depthwise"):
        network, x = deployed(name), inputs()
        with torch.autocast("cpu", torch.bfloat16):
            outputs, counts = network.run(x)
            expected = network.masked(x)
        assert outputs.dtype == torch.bfloat16
        assert_same((outputs, counts), expected, 0.03)


def test_an_empty_batch_has_no_outputs() -> None:
    outputs, counts = deployed("chain").run(inputs()[:0])
    assert outputs.shape == (0, 5)
    assert counts.shape == (0, 3)
