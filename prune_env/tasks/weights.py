"""Weights on disk: read without unpickling objects, checked before use, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from prune_env.files import write

NESTED = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts file a state dict."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch state dict (read with `weights_only=True`).

    Nested dictionaries and the prefixes of wrappers are taken off.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is truncated, corrupt, or holds something other than named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    # A broken file makes the readers raise anything from struct's errors to the unpickler's.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights file {path} is truncated, corrupt or no state dict: {reason}") from error
    content = _unwrap(found)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(content):
        raise ValueError(f"weights file {path} holds no state dict: a mapping of names to tensors is allowed")
    return tensors


def load_weights(network: nn.Module, path: Path | str) -> None:
    """Load a weights file into a network, in place; on an error the network stays as it was.

    Batch counters of BatchNorm may be absent: they are no weights.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A corrupt file, names or shapes that do not fit (the first few are named), or NaN or Inf.
    """
    tensors = read_tensors(path)
    own = network.state_dict()
    wrong = [f"{n} is missing" for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    wrong += [f"{n} is not in the network" for n in tensors if n not in own]
    wrong += [
        f"{n} has shape {tuple(t.shape)}, not {tuple(own[n].shape)}"
        for n, t in tensors.items()
        if n in own and t.shape != own[n].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"weights file {path} does not fit the network: {'; '.join(wrong[:3])}{more}")
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"weights file {path} holds NaN or Inf in {', '.join(bad[:3])} ({len(bad)} tensors in all)")
    network.load_state_dict(tensors, strict=False)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file so that at any moment `path` is absent, the old file, or the whole new one.

    Raises:
        OSError: The file cannot be written; nothing of it is left.
    """
    # Tied tensors share memory, which safetensors refuses; a state dict names them twice anyway.
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write(path, safetensors.torch.save(separate, metadata=dict(metadata or {})))


def _unwrap(found: object) -> dict[str, object]:
    if not isinstance(found, Mapping):
        return {}
    for key in NESTED:
        if isinstance(found.get(key), Mapping):
            return _unwrap(found[key])
    tensors = dict(found)
    for prefix in PREFIXES:
        if tensors and all(isinstance(name, str) and name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors
