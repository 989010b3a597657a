"""The compiled program: where it runs and where it gives way, what it reads, and that it never outlives its network."""

from __future__ import annotations

import copy
import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from prune_env.pruning.engine import native, program
from prune_env.pruning.engine.deployed import DeployedNetwork
from prune_env.pruning.engine.program import Program, Unfit, forget, program_of
from tests.env.deployed_networks import (
    NATIVE,
    OTHERS,
    assert_same,
    choices,
    deployed,
    inputs,
    one_by_one,
    rectified,
)
from tests.env.gated_networks import GATEABLE

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
compiling = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The kernel is looked for anew."""
    fresh = cache(native.kernel.__wrapped__)
    monkeypatch.setattr(native, "kernel", fresh)
    monkeypatch.setattr(program, "kernel", fresh)
    return monkeypatch


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def changed(network: DeployedNetwork) -> None:
    with torch.no_grad():
        network.layers[0].producer.weight.mul_(1.5)


@compiling
def test_a_compiler_makes_a_kernel() -> None:
    assert native.compiled()


@compiling
@pytest.mark.parametrize("name", [*GATEABLE, *NATIVE])
def test_the_kernel_runs_these(name: str) -> None:
    assert program_of(deployed(name)) is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "sequence": "does not know its kind",
        "padded": "does not know its kind",
        "branching": "cannot be walked",
        "twoinputs": "more than one input",
        "named": "not its one argument",
        "enclosed": "a module of torch's own",
        "paired": "not another operation's output",
    }.items(),
)
@compiling
def test_it_gives_way_to_torch_s_operations_where_it_cannot_run(name: str, reason: str) -> None:
    assert name in OTHERS
    network = deployed(name)
    with pytest.raises(Unfit, match=reason):
        Program(network)
    assert program_of(network) is None


@compiling
@pytest.mark.parametrize("name", ["chain", "residual", "joined", "kernels", "wide", "flat"])
def test_it_chooses_the_same_channels(name: str) -> None:
    for trust in (0.5, 1.0):
        network, x = deployed(name, 0.5, trust), inputs()
        active = choices(network, x)
        for at, one in enumerate(x.split(1)):
            counts = network.run(one)[1][0]
            flow = program_of(network).flow
            for mask, found, count in zip(active, flow.active, counts.tolist(), strict=True):
                assert found[:count].sort().values.tolist() == mask[at].nonzero().flatten().tolist()


@compiling
@pytest.mark.parametrize("name", ["chain", "wide"])
def test_a_policy_sees_inputs_that_are_not_active_as_zeros(name: str) -> None:
    """Which are something else than nothing, to a policy that takes their mean away."""
    network, x = deployed(name, agent=True), inputs()
    before = network.masked(x)[1]
    for seat in network.policy.seats:
        seat.sees = ((0.4, 1.5), (0.8, 0.7))
    expected = network.masked(x)
    assert not torch.equal(expected[1], before)
    assert_same(one_by_one(network, x), expected)


@compiling
@pytest.mark.parametrize("name", ["chain", "residual", "joined", "kernels", "wide", "flat", "tokens"])
def test_a_channel_that_is_not_active_is_not_read(name: str) -> None:
    """NaN in all weights that belong to it, except the predictors' (zero times NaN would be NaN)."""
    network, x = deployed(name), inputs(1)
    expected, active = network.run(x), [mask[0] for mask in choices(network, x)]
    assert not all(mask.all() for mask in active)
    with torch.no_grad():
        for layer, mask in zip(network.layers, active, strict=True):
            layer.producer.weight[~mask] = torch.nan
            layer.shift[~mask] = torch.nan
        for reader, at, index, unit in network.reads:
            module = network.network.get_submodule(reader)
            closed = ~active[at] if index is None else torch.tensor(index)[~active[at][list(unit)]]
            getattr(module, "producer", module).weight[:, closed] = torch.nan
    forget(network)
    found = network.run(x)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@compiling
def test_maps_between_layers_hold_active_channels_only() -> None:
    """Where everything on the way treats channels alike; a concatenation, say, needs all of them."""
    whole = {name: program_of(deployed(name)).flow.whole for name in ("chain", "wide", "flat", "kernels", "joined")}
    assert not any(any(whole[name]) for name in ("chain", "wide", "flat"))
    assert whole["kernels"] == [False, False, False, False, True]
    assert whole["joined"] == [True, True, True, False]


@compiling
@pytest.mark.parametrize("name", ["wide", "flat"])
def test_threads_change_no_output(name: str, two_threads: None) -> None:
    network, x = deployed(name, 0.9, agent=True), inputs()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(network.run(x))
    assert all(torch.equal(outputs, found[0][0]) and torch.equal(counts, found[0][1]) for outputs, counts in found)


@compiling
def test_calls_from_several_threads_do_not_meet() -> None:
    network, x = deployed("wide", agent=True), inputs(8)
    expected, found = network.run(x), {}

    def call(at: int) -> None:
        runs = (network.run, network.masked) if at % 2 else (network.masked, network.run)
        found[at] = [one for _ in range(5) for one in (run(x[at : at + 1]) for run in runs)]

    callers = [threading.Thread(target=call, args=(at,)) for at in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for at in range(8):
        for one in found[at]:
            assert_same(one, (expected[0][at : at + 1], expected[1][at : at + 1]))


def test_it_runs_without_the_kernel(rebuilt: pytest.MonkeyPatch) -> None:
    rebuilt.setenv("PRUNE_ENV_NATIVE", "0")
    assert not native.compiled()
    for network in (deployed("chain", 0.5, 0.5, agent=True), rectified("residual")):
        expected = network.masked(inputs())
        assert_same(network.run(inputs()), expected)
        assert_same(one_by_one(network, inputs()), expected)
        assert program_of(network) is None


def missing(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("PATH", str(tmp_path))


def failing(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("CC", "false")


def silent(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("CC", "true")


def homeless(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere() -> Path:
        raise RuntimeError("no home")

    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(native.Path, "home", nowhere)


def unwritable(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def damaged(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernel.so").write_bytes(b"no library")
    patch.setattr(native, "_built", lambda flags: tmp_path / "kernel.so")


@pytest.mark.parametrize("trouble", [missing, failing, silent, homeless, unwritable, damaged])
def test_a_kernel_that_cannot_be_built_is_done_without(
    trouble: Callable[[pytest.MonkeyPatch, Path], None], rebuilt: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rebuilt.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trouble(rebuilt, tmp_path)
    assert native.kernel() is None
    network = deployed("chain")
    assert_same(network.run(inputs(2)), network.masked(inputs(2)))
    assert not list(tmp_path.glob("cache/prune_env/*"))


@compiling
def test_it_is_built_once_and_without_threads_where_there_are_none(rebuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rebuilt.setenv("XDG_CACHE_HOME", str(tmp_path))
    rebuilt.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))
    rebuilt.setattr(native, "THREADED", "-fno-such-thing")
    assert native.compiled()
    (library,) = tmp_path.glob("prune_env/*")
    built = library.stat().st_mtime_ns
    native.kernel.cache_clear()
    assert native.compiled()
    assert [(file, file.stat().st_mtime_ns) for file in tmp_path.glob("prune_env/*")] == [(library, built)]
    network = deployed("kernels")
    assert_same(network.run(inputs(2)), network.masked(inputs(2)))


@compiling
def test_other_weights_make_another_program() -> None:
    network, x = deployed("chain"), inputs(2)
    before, first = network.run(x), program_of(network)
    assert program_of(network) is first
    changed(network)
    assert torch.equal(network.run(x)[0], before[0]), "it holds copies of the weights"
    forget(network)
    assert_same(network.run(x), network.masked(x))
    for change in (network.float, lambda: network.load_state_dict(network.state_dict())):
        changed(network)
        change()
        assert_same(network.run(x), network.masked(x))
    assert program_of(network) is not first


@compiling
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats_do_not_run_on_it(dtype: torch.dtype) -> None:
    network, x = deployed("chain"), inputs(2)
    network.run(x)
    assert program_of(network.to(dtype)) is None
    with pytest.raises(RuntimeError, match="type"):
        network.run(x)
    with pytest.raises(RuntimeError, match="type"):
        deployed("chain").run(x.to(dtype))
    assert_same(network.float().run(x), network.masked(x))


@compiling
def test_a_copy_runs_by_itself() -> None:
    network, x = deployed("chain", agent=True), inputs()
    before = network.run(x)
    other = copy.deepcopy(network)
    changed(network)
    forget(network)
    assert torch.equal(other.run(x)[0], before[0])
    assert program_of(other) is not program_of(network)
    assert not torch.equal(network.run(x)[0], before[0])


@compiling
@pytest.mark.parametrize("agent", [False, True])
def test_a_network_that_is_no_longer_used_is_collected_with_its_program(agent: bool) -> None:
    network = deployed("residual", agent=agent)
    network.run(inputs(2))
    network.masked(inputs(2))
    references = [weakref.ref(network), weakref.ref(program_of(network)), weakref.ref(network.layers[0])]
    del network
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@compiling
@pytest.mark.parametrize("name", ["kernels", "flat", "tokens"])
def test_every_layout_of_the_input_gives_the_same(name: str) -> None:
    network, x = deployed(name), inputs(2)
    expected = network.run(x)
    for given in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], dim=-1)[..., 1],
        x.clone().requires_grad_(),
    ):
        found = network.run(given)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@compiling
@pytest.mark.parametrize("name", ["chain", "flat", "kernels"])
def test_an_input_that_does_not_fit_is_refused(name: str) -> None:
    network = deployed(name)
    for shape in ((1, 2, 8, 8), (1, 4, 8, 8), (1, 3, 8, 3), (1, 3, 1, 1), (3, 8, 8)):
        with pytest.raises((ValueError, RuntimeError)):
            network.run(torch.zeros(shape))


@compiling
@pytest.mark.parametrize("name", ["chain", "joined", "wide", "kernels"])
def test_an_input_of_nan_gives_nan_and_no_more(name: str) -> None:
    for network in (deployed(name, 0.5, 0.5, agent=True), rectified(name)):
        expected = network.run(inputs())
        for wrong in (torch.nan, torch.inf):
            outputs, counts = network.run(torch.full((1, 3, 8, 8), wrong))
            assert outputs.isnan().any()
            assert all(1 <= count <= layer.channels for count, layer in zip(counts[0], network.layers, strict=True))
        assert torch.equal(network.run(inputs())[0], expected[0])
