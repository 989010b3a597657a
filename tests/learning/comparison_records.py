"""Records of comparisons as somebody might have measured them, written by hand: no network is pruned for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agents.comparison import Cell, Comparison
from agents.comparison_store import Record, Store

GROUPS = {"stem.0": 16, "wide.0": 32, "down.0": 16, "block.conv1": 16, "narrow.0": 12, "head.0": 32}
DENSE = {"macs": 1000, "params": 500}


def record(
    method: str,
    accuracy: float,
    *,
    seed: int = 0,
    budget: float = 0.5,
    before: float | None = None,
    evaluations: int = 0,
    epochs: int = 0,
    task: str = "digits-cnn",
    **changes: Any,
) -> Record:
    """A finished cell; `before` makes `accuracy` the one after fine-tuning."""
    cell = Cell(task, method, budget, seed)
    first = accuracy if before is None else before
    measured = {"search_accuracy": first, "test_accuracy": first, "search_loss": 1.0, "test_loss": 1.0}
    measured |= {"macs": round(1000 * budget) - 2, "params": 300}
    if before is not None:
        measured |= {"fine_tuned_search_accuracy": accuracy, "fine_tuned_test_accuracy": accuracy}
    made = {
        "cell": {"task": task, "method": method, "budget": budget, "seed": seed},
        "kind": cell.kind,
        "protocol": Comparison(fine_tune_epochs=epochs).protocol,
        "measured": measured,
        "kept": {group: [channels // 2, channels] for group, channels in GROUPS.items()},
        "plan": {"keep": {}, "runtime_keep": {}},
        "facts": {
            "importance": "l1",
            "repair": "auto",
            "own_training": "",
            "evaluations": evaluations,
            "own": {},
            "recalibrate": True,
            "epochs": epochs,
        },
        "dense": DENSE,
        "latency": {"pruned_s": 0.002, "dense_s": 0.004, "threads": 1, "batch": 1, "dtype": "float32"},
        "cpu_seconds": {"find": 0.5},
        "seconds": 2.0,
        "torch": "2",
    }
    return made | changes


def runtime(method: str, accuracy: float, *, seed: int = 0, budget: float = 0.5) -> Record:
    """A finished cell of a method that chooses channels anew for every image."""
    made = record(method, accuracy, seed=seed, budget=budget)
    measured = {"search_accuracy": accuracy, "test_accuracy": accuracy, "params": 550, "dynamic_macs": 1000 * budget}
    measured |= {"dynamic_macs_share_5": 0.8 * budget, "dynamic_macs_share_95": 1.3 * budget}
    del made["kept"], made["plan"]
    facts = made["facts"] | {"importance": "own", "repair": "own", "own_training": "12 epochs, network and gates"}
    return made | {"measured": measured, "facts": facts}


def failed(method: str, reason: str, *, seed: int = 0, budget: float = 0.5) -> Record:
    """A cell that could not be measured."""
    cell = {"task": "digits-cnn", "method": method, "budget": budget, "seed": seed}
    return {"cell": cell, "kind": "paper", "failed": reason}


def stored(path: Path, records: list[Record], **options: Any) -> Store:
    """A results folder with these records."""
    cells = [Cell(**one["cell"]) for one in records]
    pruned = [cell for cell in cells if cell.method != "dense"]
    comparison = Comparison(
        methods=tuple(cell.method for cell in pruned) or ("uniform",),
        budgets=tuple(cell.budget for cell in pruned) or (0.5,),
        seeds=tuple(cell.seed for cell in cells) or (0,),
        **options,
    )
    store = Store.create(path, comparison)
    for cell, one in zip(cells, records, strict=True):
        store.save(cell, {name: value for name, value in one.items() if name != "cell"})
    return store


MANY = {
    "uniform": (0.62, 0, 0.3),
    "error_curves": (0.68, 0, 0.4),
    "greedy": (0.70, 48, 6.0),
    "lamp": (0.55, 0, 0.3),
    "neuron_merging": (0.40, 0, 0.3),
    "provable_filter_pruning": (0.66, 0, 1.2),
    "random_search": (0.71, 60, 5.0),
    "cem": (0.76, 60, 5.5),
    "td3": (0.78, 60, 11.0),
    "amc": (0.69, 60, 14.0),
}


def many(*, seeds: int = 3, budgets: tuple[float, ...] = (0.7, 0.5, 0.35)) -> list[Record]:
    """A whole comparison: ten static methods, two runtime methods, one failure."""
    rng = np.random.default_rng(0)
    made = [record("dense", 0.92, seed=seed, budget=1.0, measured=_dense(0.92)) for seed in range(seeds)]
    for budget in budgets:
        for seed in range(seeds):
            for method, (accuracy, evaluations, seconds) in MANY.items():
                before = float(np.clip(accuracy + 0.6 * (budget - 0.5) + rng.normal(0, 0.012), 0, 1))
                after = 0.86 + 0.05 * before + float(rng.normal(0, 0.003)) - 0.02 * (0.7 - budget)
                one = record(method, after, seed=seed, budget=budget, before=before, evaluations=evaluations, epochs=2)
                shares = rng.uniform(0.2, 1.0, len(GROUPS))
                kept = {g: [max(1, round(c * s)), c] for (g, c), s in zip(GROUPS.items(), shares, strict=True)}
                params = round(250 + 300 * rng.random())
                latency = one["latency"] | {"pruned_s": 0.001 + 0.002 * rng.random()}
                made.append(
                    one
                    | {"kept": kept, "latency": latency, "measured": one["measured"] | {"params": params}}
                    | {"cpu_seconds": {"find": seconds * rng.uniform(0.8, 1.4), "fine_tune": 3.0}}
                )
            made += [runtime("runtime", 0.905 - 0.01 * (0.7 - budget), seed=seed, budget=budget)]
            made += [runtime("fbs", 0.895 - 0.02 * (0.7 - budget), seed=seed, budget=budget)]
    made[-1] = {"cell": made[-1]["cell"], "kind": "runtime", "failed": "the loss became nan at epoch 2 <b>"}
    return made


def _dense(accuracy: float) -> dict[str, float]:
    return {
        "search_accuracy": accuracy,
        "test_accuracy": accuracy,
        "search_loss": 0.3,
        "test_loss": 0.3,
        "macs": DENSE["macs"],
        "params": DENSE["params"],
    }
