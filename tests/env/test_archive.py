"""The archive: what is loaded equals what was saved, bit for bit; what is hostile, damaged or unwritable is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from prune_env.pruning import archive
from prune_env.pruning.archive import load, load_plan, save, widths
from prune_env.pruning.plan import Plan
from prune_env.pruning.surgery import cut
from prune_env.pruning.tracing import trace
from prune_env.pruning.trust import tensor_functions

from .small_networks import NETWORKS, build, example

FULL = Plan({})
ROOT = Path(__file__).parents[2]

# Name -> input size.
TORCHVISION = {
    "resnet18": 32,
    "densenet121": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "regnet_y_400mf": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "mnasnet0_5": 32,
}


class Colour(Enum):
    RED = 1


class Everything(nn.Module):
    """Every kind of attribute that can be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.nothing = None
        self.register_parameter("absent", None)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("passing", torch.arange(4), persistent=False)
        self.loose = torch.randn(4)
        self.plain = [self.first, (1, 2.5, "three"), {"a": None, 7: True}]
        self.values = (torch.Size([2, 3]), {1, 2}, OrderedDict(z=1, a=2), float("-inf"), slice(0, 4, 2), range(3))
        self.formats = [torch.bfloat16, torch.device("cpu"), torch.channels_last]
        self.numbers = [np.int64(3), np.float32(0.5)]
        self.functions = [F.relu, F.gelu, F.max_pool2d, torch.tanh, partial(F.softmax, dim=1)]
        self.norm = partial(nn.LayerNorm, eps=1e-3)
        self.kind = nn.ReLU
        self.parent = [self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(x) + self.tied(x) * self.frozen + self.kept + self.passing + self.loose
        for function in (*self.functions[:2], *self.functions[3:]):
            x = function(x)
        return self.plain[0](x)


class Bad(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.oddity = value


def through_disk(network: nn.Module, tmp_path: Path, **options: object) -> nn.Module:
    save(network, FULL, tmp_path / "net")
    return load(tmp_path / "net", **options)


def assert_same(network: nn.Module, loaded: nn.Module, x: torch.Tensor) -> None:
    modules, others = (
        dict(network.named_modules(remove_duplicate=False)),
        dict(loaded.named_modules(remove_duplicate=False)),
    )
    assert [(k, type(v), v.training) for k, v in modules.items()] == [
        (k, type(v), v.training) for k, v in others.items()
    ]
    for table in ("named_parameters", "named_buffers"):
        tensors = zip(
            getattr(network, table)(remove_duplicate=False), getattr(loaded, table)(remove_duplicate=False), strict=True
        )
        for (name, tensor), (other_name, other) in tensors:
            assert (name, tensor.dtype, tensor.requires_grad) == (other_name, other.dtype, other.requires_grad)
            assert torch.equal(tensor, other)
    assert list(network.state_dict()) == list(loaded.state_dict())
    assert [repr(m.extra_repr()) for m in network.modules()] == [repr(m.extra_repr()) for m in loaded.modules()]
    with torch.no_grad():
        assert torch.equal(network(x), loaded(x))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("convnext_tiny", "inception_v3") else n for n in TORCHVISION],
)
def test_torchvision_networks_come_back_bit_for_bit(name: str, tmp_path: Path):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
    assert_same(network, through_disk(network, tmp_path), torch.randn(2, 3, TORCHVISION[name], TORCHVISION[name]))


def test_a_vision_transformer_comes_back_bit_for_bit(tmp_path: Path):
    network = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16
    ).eval()
    assert_same(network, through_disk(network, tmp_path), torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_networks_come_back_bit_for_bit_with_plan_and_widths(name: str, tmp_path: Path):
    network = build(name)
    graph = trace(network, example())
    plan = Plan({group.name: tuple(range(0, group.channels, 2)) for group in graph.groups})
    small = cut(network, graph, plan)
    save(small, plan, tmp_path / "net")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model.safetensors", "net", "network.json"]
    assert_same(small, load(tmp_path / "net"), example(3))
    assert load_plan(tmp_path / "net") == plan
    assert json.loads((tmp_path / "net" / "network.json").read_text())["widths"] == widths(small)


def test_a_sequential_in_training_mode_keeps_its_mode_and_memory_layout(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.25)).train()
    network.to(memory_format=torch.channels_last)[1].eval()
    loaded = through_disk(network, tmp_path)
    assert [m.training for m in loaded.modules()] == [True, True, False, True, True]
    assert loaded[0].weight.stride() == network[0].weight.stride()
    assert_same(network.eval(), loaded.eval(), example(2))


def test_a_network_of_ones_own_class_keeps_ties_buffers_and_every_kind_of_attribute(tmp_path: Path):
    network = Everything()
    loaded = through_disk(network, tmp_path)
    assert_same(network, loaded, torch.randn(3, 4))
    assert loaded.first is loaded.again is loaded.plain[0]
    assert loaded.tied.weight is loaded.first.weight
    assert loaded.parent[0] is loaded
    assert (loaded.nothing, loaded.absent, loaded.plain[1:]) == (None, None, network.plain[1:])
    for name in ("values", "formats", "numbers"):
        assert getattr(loaded, name) == getattr(network, name)
    assert loaded.functions[:4] == network.functions[:4]
    assert (loaded.functions[4].func, loaded.functions[4].keywords) == (F.softmax, {"dim": 1})
    assert [type(v) for v in loaded.values] == [type(v) for v in network.values]
    assert (loaded.norm.func, loaded.norm.keywords, loaded.kind) == (nn.LayerNorm, {"eps": 1e-3}, nn.ReLU)
    loaded.tied(torch.randn(2, 4)).sum().backward()
    assert loaded.first.weight.grad is not None


def test_loading_calls_no_constructor_and_the_result_trains_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = Everything()
    save(network, FULL, tmp_path / "net")
    monkeypatch.setattr(Everything, "__init__", lambda self: pytest.fail("constructor called"))
    loaded = load(tmp_path / "net")
    with torch.no_grad():
        loaded.first.weight.add_(1)
    assert not torch.equal(loaded.first.weight, network.first.weight)
    assert torch.equal(load(tmp_path / "net").first.weight, network.first.weight)


MINE = """
from enum import Enum
import torch
from torch import nn

class Mode(Enum):
    LOUD = 2

def double(x):
    return 2 * x

class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.__dict__.update(options)
    def forward(self, x):
        return self.body(x).mean((2, 3)) * (2 if hasattr(self, "mode") else 1)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_a_fresh_process_loads_with_allow_or_after_importing_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(MINE)
    mine = ModuleType("my_nets")
    exec(MINE, vars(mine))
    monkeypatch.setitem(sys.modules, "my_nets", mine)
    x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    for name, options in (("simple", {}), ("richer", {"mode": mine.Mode.LOUD, "act": mine.double})):
        network = mine.Net(**options).eval()
        save(network, Plan({}), tmp_path / name)
        torch.save(network(x).detach(), tmp_path / f"{name}.pt")
    code = f"""
import sys, torch
from pathlib import Path
from prune_env.pruning.archive import load
folder = Path({str(tmp_path)!r})
x = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
def refused(name, **options):
    try:
        load(folder / name, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError(name)
def same(name, **options):
    return torch.equal(load(folder / name, **options)(x), torch.load(folder / f"{{name}}.pt", weights_only=True))
assert "allow=('my_nets',)" in refused("simple"), refused("simple")
assert "my_nets" not in sys.modules
assert same("simple", allow=("my_nets",)) and same("simple", allow="my_nets")
assert same("simple")
assert "my_nets:" in refused("richer")
assert same("richer", allow=("my_nets",))
"""
    loaded = run(code, tmp_path)
    assert loaded.returncode == 0, loaded.stderr


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A saved network whose description was changed by someone who knows how the checksum is made."""
    save(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), FULL, folder)
    path = folder / "network.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    change(record)
    text = json.dumps(record, sort_keys=True).encode()
    path.write_text(json.dumps({**record, "checksum": hashlib.sha256(text).hexdigest()}))
    return folder


HOSTILE_CLASSES = [
    "os:system",
    "posix:system",
    "subprocess:Popen",
    "builtins:eval",
    "builtins:object",
    "torch:load",
    "torch:os.system",
    "torch.nn.modules.module:torch.os.system",
    "torch.nn.modules.module:warnings.sys.modules",
    "torch.nn.modules:Linear",
    "torch.nn.modules.linear:Tensor",
    "torch.nn.modules.linear:Linear.forward",
    "torch.nn.modules.missing:Linear",
    "torch.nn.modules.linear:Missing",
    "torch.hub:load",
    "torch.fx.graph_module:GraphModule",
    "torch.jit._script:RecursiveScriptModule",
    "torch.utils.bottleneck.__main__:main",
    "prune_env.tasks.__main__:Net",
    "prune_env.pruning.archive:save",
    "antigravity:Net",
    "never_imported_by_anyone:Net",
    "torch.nn.modules.linear",
    ":Linear",
    "",
    "../../etc:passwd",
    5,
    None,
    ["torch.nn.modules.linear:Linear"],
]


@pytest.mark.parametrize("name", HOSTILE_CLASSES, ids=str)
def test_a_description_that_names_anything_but_a_trusted_module_class_is_refused(name: object, tmp_path: Path):
    folder = forged(tmp_path / "net", lambda record: record["modules"][1].update({"class": name}))
    with pytest.raises(ValueError, match=r"network\.json"):
        load(folder)


HOSTILE_VALUES = [
    {"function": "os:system"},
    {"function": "builtins:exec"},
    {"function": "torch:load"},
    {"function": "torch:save"},
    {"function": "torch:from_file"},
    {"function": "torch.hub:load"},
    {"function": "torch.utils.collect_env:run"},
    {"function": "torch.utils.cpp_extension:load_inline"},
    {"function": "torch.nn.functional:importlib"},
    {"function": "torchvision.models.resnet:resnet18"},
    {"function": "prune_env.pruning.archive:save"},
    {"function": "torchvision.ops.misc:torch.os.system"},
    {"class": "subprocess:Popen"},
    {"class": "torch.fx.graph_module:GraphModule"},
    {"partial": [{"function": "os:system"}, {"tuple": ["true"]}, {"dict": []}]},
    {"enum": ["http:HTTPStatus", "OK"]},
    {"dtype": "os"},
    {"device": "nowhere"},
    {"pickle": "gASVKQ=="},
    {"tensor": "missing"},
    {"module": 99},
    {"dict": [1]},
    {"a": 1, "b": 2},
    {},
    {"float": "x"},
]


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=str)
def test_a_description_with_a_hostile_or_senseless_value_is_refused(value: object, tmp_path: Path):
    folder = forged(tmp_path / "net", lambda record: record["modules"][2]["attributes"].update(inplace=value))
    with pytest.raises(ValueError, match=r"network\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["forward", "__class__", "__dict__", "_forward_hooks", "_compiled_call_impl", "train"])
@pytest.mark.parametrize("table", ["attributes", "parameters", "buffers", "modules"])
def test_an_attribute_that_would_replace_what_nn_module_does_is_refused(name: str, table: str, tmp_path: Path):
    folder = forged(tmp_path / "net", lambda record: record["modules"][2][table].update({name: None}))
    with pytest.raises(ValueError, match="may not have an attribute"):
        load(folder)


SENSELESS: list[Callable[[dict[str, Any]], Any]] = [
    lambda record: record.pop("modules"),
    lambda record: record.update(modules=[]),
    lambda record: record.update(modules=[{}]),
    lambda record: record.update(tensors={}),
    lambda record: record["tensors"]["0.weight"].update(shape=[2, 2]),
    lambda record: record["tensors"]["0.weight"].update(parameter=False),
    lambda record: record["tensors"]["0.weight"].update(channels_last=True),
    lambda record: record["modules"][1]["parameters"].update(weight="other"),
    lambda record: record["modules"][0]["modules"].update({"1": 17}),
    lambda record: record.update(version=2),
    lambda record: record.update(format="something else"),
    lambda record: record.pop("model_sha256"),
]


@pytest.mark.parametrize("change", SENSELESS)
def test_a_description_that_does_not_fit_its_tensors_is_refused(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
):
    folder = forged(tmp_path / "net", change)
    with pytest.raises(ValueError, match=r"network\.json"):
        load(folder)


def test_torchs_trusted_functions_are_on_tensors_only():
    names = {name.split(":")[1] for name in tensor_functions()}
    assert {"relu", "gelu", "softmax", "max_pool2d", "tanh"} <= names
    assert not names & {"load", "save", "from_file", "compile", "import_ir_module", "boolean_dispatch", "eval", "exec"}


@pytest.mark.parametrize("name", ["model.safetensors", "network.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "noise"])
def test_a_damaged_folder_is_refused_by_file_name(name: str, damage: str, tmp_path: Path):
    save(build("chain"), FULL, tmp_path / "net")
    path = tmp_path / "net" / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": content[:-7], "flipped": flipped, "noise": os.urandom(99)}[damage])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(tmp_path / "net")


def test_a_folder_that_is_not_there_or_holds_something_else_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"network\.json cannot be read"):
        load(tmp_path / "nowhere")
    (tmp_path / "network.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"network\.json is damaged"):
        load(tmp_path)
    (tmp_path / "network.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe a network"):
        load(tmp_path)


def test_a_used_folder_is_refused_and_stays_as_it_was(tmp_path: Path):
    network = build("chain")
    save(network, FULL, tmp_path / "net")
    before = {path: path.read_bytes() for path in (tmp_path / "net").iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        save(network, FULL, tmp_path / "net")
    assert {path: path.read_bytes() for path in (tmp_path / "net").iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        save(network, FULL, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(network, FULL, tmp_path / "empty")
    assert_same(network, load(tmp_path / "empty"), example())


@pytest.mark.parametrize("failing", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"open": (archive, "_write"), "fsync": (os, "fsync"), "replace": (os, "replace")}[failing]
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match="No space left"):
        save(build("chain"), FULL, tmp_path / "runs" / "one" / "net")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda x: x, "inner.oddity.*top level"),
        (object(), "inner.oddity is a object"),
        (nn.Linear(2, 2).forward, "inner.oddity is a method"),
        (print, "inner.oddity.*Python's own"),
        (int, "inner.oddity.*Python's own"),
        (torch.Generator(), "inner.oddity is a Generator"),
        ([{"deep": (1, object())}], "inner.oddity is a object"),
        (nn.UninitializedParameter(), "inner.oddity is a UninitializedParameter"),
        (torch.zeros(2, device="meta"), "inner.oddity.*meta"),
        (torch.eye(2).to_sparse(), "inner.oddity.*sparse"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_module_and_attribute(value: object, reason: str, tmp_path: Path):
    with pytest.raises(ValueError, match=reason):
        save(Bad(value), FULL, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_local_classes_hooks_and_replaced_methods_are_refused(tmp_path: Path):
    class Local(nn.Identity):
        pass

    hooked, replaced = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())
    hooked[0].register_forward_hook(lambda *args: None)
    replaced[0].forward = torch.relu
    for network, reason in (
        (Local(), "top level"),
        (hooked, "0 has forward hooks"),
        (replaced, r"0\.forward replaces"),
    ):
        with pytest.raises(ValueError, match=reason):
            save(network, FULL, tmp_path / "net")


def test_an_attribute_that_contains_itself_is_refused(tmp_path: Path):
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match=r"inner\.oddity contains itself"):
        save(Bad(endless), FULL, tmp_path / "net")


def test_an_enumeration_needs_allow(tmp_path: Path):
    network = Bad(Colour.RED)
    save(network, FULL, tmp_path / "net")
    with pytest.raises(ValueError, match="Colour"):
        load(tmp_path / "net")
    assert load(tmp_path / "net", allow=(__name__,)).inner.oddity is Colour.RED
