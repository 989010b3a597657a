"""Networks that a method trains before it prunes: trained once for their settings, then loaded from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import filelock
from torch import nn

from prune_env.tasks.dense import writable_root
from prune_env.tasks.task import Task
from prune_env.tasks.weights import read_tensors, write_tensors


def train_once(
    network: nn.Module,
    task: Task,
    *,
    kind: str,
    content: Mapping[str, object],
    run: Callable[[Path], object],
    root: Path | str | None = None,
) -> Path:
    """Fill a network with what a training makes of it: from the cache, or by the training.

    Processes that want the same network wait for the one that trains it; a killed training is taken up again.

    Args:
        network: Filled in place; its state now is part of what decides the outcome.
        task: On whose training split it is trained.
        kind: What the training is for; the cache's folder.
        content: Everything else that decides the outcome. JSON can hold it.
        run: Trains the network; it is given the checkpoint to write and to go on from.
        root: Data root, under which the cache is.

    Returns:
        The file with the network's state.

    Raises:
        ValueError: A corrupt file in the cache.
        TrainingDiverged: The loss became NaN or Inf.
        OSError: The cache cannot be written.
    """
    folder = writable_root(None if root is None else Path(root).expanduser()) / kind
    name = task.name.replace(":", "_").replace("/", "_")
    file = folder / f"{name}-{_digest(network, task, content)}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_suffix(".lock")):
            if not file.exists():
                checkpoint = file.with_suffix(".checkpoint.safetensors")
                run(checkpoint)
                write_tensors(network.state_dict(), file)
                checkpoint.unlink(missing_ok=True)
    network.load_state_dict(read_tensors(file))
    return file


def _digest(network: nn.Module, task: Task, content: Mapping[str, object]) -> str:
    """A name for everything that decides the outcome, the weights that it starts from included."""
    digest = hashlib.sha256()
    whole = {**content, "task": dict(task.settings)}
    digest.update(json.dumps(whole, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
