"""`python -m agents.export RUN --out DIR`: the cut network as safetensors and JSON.

network = prune_env.load("DIR")      # an ordinary module, in eval mode; no pickle, no training data, no agents
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from agents import runtime_report, runtime_train
from agents.cli import guarded, parse
from agents.config import own_package
from agents.record import RunFolder
from agents.runtime_options import RuntimeTrainConfig, is_runtime
from prune_env.pruning import archive
from prune_env.pruning.measure import count_params


@dataclass(frozen=True)
class Order:
    """Write the learned network of a run to a folder of its own."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    budget: float | None = None
    """Of a runtime run: another budget than its own, which its agents are asked for anew."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    order = parse(Order, arguments, program="python -m agents.export")
    run = RunFolder.open(order.run)
    config = runtime_train.config_of(order.run) if is_runtime(order.run) else run.config
    if not (order.run / archive.MODEL).exists():
        raise ValueError(f"{order.run} is not finished: python -m {config.program} --resume {order.run}")
    plan = archive.load_plan(order.run)
    if order.budget is None:
        network = archive.load(order.run, allow=own_package(config.task, config.network))
    elif isinstance(config, RuntimeTrainConfig):
        network, plan = runtime_report.redeployed(order.run, config, order.budget)
    else:
        raise ValueError(f"budget is {order.budget}; only runtime runs serve several budgets, {order.run} is none")
    archive.save(network, plan, order.out)
    Console().print(
        f"{order.out}: {count_params(network):,} parameters; load it with prune_env.load({str(order.out)!r})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
