"""The archive: a cut network on disk as safetensors and JSON, no pickle: opening one runs no code of its choosing.

A folder holds `model.safetensors` (every tensor) and `network.json` (format version, checksums, the plan, the width
of every layer, and the blueprint from which the network is rebuilt).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from prune_env.pruning.blueprint import build, describe
from prune_env.pruning.plan import Plan

FORMAT = "prune_env network"
VERSION = 1
MODEL, NETWORK = "model.safetensors", "network.json"


def save(network: nn.Module, plan: Plan, folder: str | Path) -> None:
    """Write a network and the plan that made it into a new folder: whole, or not at all.

    Args:
        network: Any module made of importable classes; usually from `cut` or `Evaluator.realise`.
        plan: The plan it was cut by.
        folder: Must not exist yet, or be empty.

    Raises:
        ValueError: The folder is in use, or the network holds something that cannot be stored; the message names
            module and attribute.
        OSError: The disk refuses (full, say); nothing is left behind.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"folder {str(folder)!r} already exists and is not empty; choose a new one")
    blueprint, tensors = describe(network)
    try:
        model = safetensors.torch.save(tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"the network's tensors cannot be stored: {error}") from None
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "plan": json.loads(plan.to_json()),
        "widths": widths(network),
        **blueprint,
    }
    record = {"checksum": _checksum(content), **content}
    with _new_folder(folder) as temporary:
        _write(temporary / MODEL, model)
        _write(temporary / NETWORK, json.dumps(record, indent=1, allow_nan=False).encode())


def load(folder: str | Path, *, allow: Sequence[str] = ()) -> nn.Module:
    """The network that `save` wrote, on the CPU; its outputs are equal bit for bit.

    Classes come from torch.nn, torchvision and prune_env; those of another package only if the caller has already
    imported their module or names the package in `allow`. Its functions need `allow`.

    Args:
        folder: What `save` wrote.
        allow: Names of packages (or modules) to trust.

    Raises:
        ValueError: A file is missing, damaged, of a later version, or names something that is not trusted; the
            message names the file.
    """
    folder = Path(folder)
    record, model = _record(folder), _read(folder / MODEL)
    if hashlib.sha256(model).hexdigest() != record["model_sha256"]:
        raise ValueError(f"{folder / MODEL} is damaged or not the one that {NETWORK} describes (checksum differs)")
    try:
        tensors = safetensors.torch.load(model)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / MODEL} is not a safetensors file: {error}") from None
    try:
        return build(record, tensors, allow=(allow,) if isinstance(allow, str) else tuple(allow))
    except ValueError as error:
        raise ValueError(f"{folder / NETWORK}: {error}") from None


def load_plan(folder: str | Path) -> Plan:
    """The plan that a saved network was cut by.

    Raises:
        ValueError: `network.json` is missing or damaged.
    """
    return Plan.from_json(json.dumps(_record(Path(folder)).get("plan")))


def widths(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Input and output width of every convolution, linear layer and norm, by module name."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd):
            found[name] = {"in": module.in_channels, "out": module.out_channels, "groups": module.groups}
        elif isinstance(module, nn.Linear):
            found[name] = {"in": module.in_features, "out": module.out_features}
        elif isinstance(module, _BatchNorm | _InstanceNorm):
            found[name] = {"in": module.num_features, "out": module.num_features}
        elif isinstance(module, nn.GroupNorm):
            found[name] = {"in": module.num_channels, "out": module.num_channels, "groups": module.num_groups}
        elif isinstance(module, nn.LayerNorm):
            found[name] = {"in": module.normalized_shape[-1], "out": module.normalized_shape[-1]}
    return {name: {key: int(value) for key, value in width.items()} for name, width in found.items()}


def _record(folder: Path) -> dict[str, Any]:
    """The checked content of `network.json`."""
    path = folder / NETWORK
    text = _read(path)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a network saved by prune_env")
    if record.get("version") != VERSION:
        raise ValueError(f"{path} has format version {record.get('version')!r}; this prune_env reads {VERSION}")
    if record.pop("checksum", None) != _checksum(record) or "model_sha256" not in record:
        raise ValueError(f"{path} is damaged (checksum differs)")
    return record


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` in one step at the end; on an error nothing is left, new parents too."""
    folder = folder.absolute()
    made = [parent for parent in folder.parents if not parent.exists()]
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the entries of a folder last, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
