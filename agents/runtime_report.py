"""The report of a runtime run: learned decisions beside fixed ones on the same network, at one budget of mean macs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.record import save_network
from agents.runtime_agent import static_keeps
from agents.runtime_deploy import deployed_network
from agents.runtime_options import RuntimeTrainConfig, task_of
from agents.runtime_stages import RuntimeLearner, Tell
from prune_env.files import write
from prune_env.pruning.engine.deployed import DeployedNetwork
from prune_env.pruning.engine.measurement import measure_deployed
from prune_env.pruning.gating.fixed import FixedDecisions, SameChannels
from prune_env.pruning.gating.layer import Decide
from prune_env.pruning.gating.measurement import Recorder, RuntimeMeasurement, measure_runtime
from prune_env.pruning.gating.stored import plan_of, static_decisions
from prune_env.pruning.gating.walk import everything
from prune_env.pruning.measure import Meter, count_params
from prune_env.pruning.plan import Plan
from prune_env.tasks.images import Split
from prune_env.tasks.task import Task

BATCH = 128
HALVINGS = 8
"""Steps of the bisection that moves all shares until the mean macs on the search split meet the budget."""


class RuntimeReporter:
    """Measures the finished network under several decisions.

    Args:
        task: Has the test split, read once per row.
        learner: The trained network and agents.
        folder: Where `report.json` goes.
        tell: Told what is under way.
    """

    def __init__(self, task: Task, learner: RuntimeLearner, folder: Path, tell: Tell) -> None:
        self.task, self.learner, self.folder, self.tell = task, learner, folder, tell
        self.statics = learner.statics()

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows, also written as `report.json`; a row that is there is not measured again.

        `dense` is the network that the run began with, `open` the trained one with every channel active. `learned` is
        the network that is deployed, with the agents' mean decisions; its agent counts as stored. `mean` gives every
        image the learned mean share of each layer, `even` the same share in all layers, and `same` gives all images the
        same channels: those that are most often active under the learned decisions. The last four are moved by one
        number, found on the search split, to meet the budget in the mean.

        At trust 0 the static shares alone decide: they meet the budget already, `even` is the even static share moved
        likewise, and `mean` is left out, because it would be `learned`.
        """
        path, rows = self.folder / "report.json", self.recorded()
        learner, trust = self.learner, self.learner.config.runtime_trust
        kept = self.kept()
        if "dense" not in rows:
            rows["dense"] = {"search": self._dense(self.task.search), "test": self._dense(self.task.test)}
            write(path, json.dumps(rows, indent=2))
        if "open" not in rows:
            rows["open"] = self._row(everything, None, {})
            write(path, json.dumps(rows, indent=2))
        if "learned" not in rows:
            offset = self._offset(lambda value: learner.decisions(offset=value), kept)
            deployed = deployed_network(learner, offset=offset)
            search, test = (self.deployed(deployed, split).row() for split in (self.task.search, self.task.test))
            agent = 0 if deployed.policy is None else count_params(deployed.policy)
            row = {"search": search, "test": test, "offset": offset, "agent_params": agent}
            shares = self._shares(learner.decisions(offset=offset))
            row |= {"runtime_keep_mean": shares.mean(1).tolist(), "runtime_keep_spread": shares.std(1).tolist()}
            rows["learned"] = row | {"static_keep": list(self.statics or ()), "kept": kept.tolist()}
            write(path, json.dumps(rows, indent=2))
        if trust == 0:
            if "even" not in rows:
                statics = static_keeps(None, learner.problem, learner.budget)
                decisions = FixedDecisions(statics, statics, trust=trust)
                rows["even"] = self._row(decisions, self.kept(statics), {"static_keep": list(statics)})
                write(path, json.dumps(rows, indent=2))
            return rows
        if "same" not in rows:
            rows["same"] = self._same(learner.decisions(offset=rows["learned"]["offset"]), kept)
            write(path, json.dumps(rows, indent=2))
        means = np.array(rows["learned"]["runtime_keep_mean"])
        even = np.full(len(means), learner.problem.even_keep(learner.budget))
        for name, keeps in (("mean", means), ("even", even)):
            if name not in rows:

                def fixed(value: float, keeps: np.ndarray = keeps) -> FixedDecisions:
                    moved = np.clip(keeps + value, learner.problem.min_keep, 1.0)
                    return FixedDecisions(moved.tolist(), self.statics, trust=trust)

                offset = self._offset(fixed, kept)
                rows[name] = self._row(fixed(offset), kept, {"offset": offset})
                write(path, json.dumps(rows, indent=2))
        return rows

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The rows that are written already.

        Raises:
            ValueError: The file is corrupt.
        """
        path = self.folder / "report.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} is corrupt: {error}") from None

    def store(self) -> None:
        """Put the network that is deployed into the run's folder; it marks the run as finished."""
        row = self.recorded()["learned"]
        plan = stored_plan(self.learner, self.statics)
        means = dict(zip(plan.keep, row["runtime_keep_mean"], strict=True))
        network = deployed_network(self.learner, offset=row["offset"])
        save_network(self.folder, network, Plan(plan.keep, runtime_keep=means))

    def deployed(self, network: DeployedNetwork, split: Split) -> RuntimeMeasurement:
        """The deployed network on a split."""
        return measure_deployed(network, split.batches(BATCH), dtype=self.learner.problem.dtype)

    def kept(self, statics: Sequence[float] | None = None) -> np.ndarray:
        """`[layers]` channels that are stored under some static shares; without any, under the learned ones."""
        problem, statics = self.learner.problem, self.statics if statics is None else statics
        if statics is None:
            return problem.channels
        decisions = static_decisions(problem.gated, statics, problem.trust)
        return np.array([len(decision.kept) for decision in decisions], dtype=np.int64)

    def _same(self, decide: Decide, kept: np.ndarray) -> dict[str, Any]:
        """The row of one choice for all images: the habit of some decisions."""
        habits = Recorder(decide, len(kept))
        self._measure(self.task.search, habits, kept)
        counts = habits.counts.mean(0)

        def same(value: float) -> SameChannels:
            return SameChannels.most_often(habits.often, [round(count * (1 + value)) for count in counts])

        offset = self._offset(same, kept)
        return self._row(same(offset), kept, {"offset": offset})

    def _row(self, decide: Decide, kept: np.ndarray | None, facts: dict[str, Any]) -> dict[str, Any]:
        search, test = (self._measure(split, decide, kept) for split in (self.task.search, self.task.test))
        return {"search": search.row(), "test": test.row(), **facts}

    def _dense(self, split: Split) -> dict[str, Any]:
        """The row of the network that the run began with: every image costs the same."""
        problem = self.learner.problem
        forms = problem.accounting
        images, labels = split.take(len(split))
        accuracy, loss = Meter(images, labels, dtype=problem.dtype).accuracy_and_loss(self.task.network)
        macs = np.full(len(labels), forms.dense_macs)
        sizes = int(forms.dense_macs), int(forms.dense_params)
        return RuntimeMeasurement(accuracy, loss, macs, sizes[1], *sizes).row()

    def _measure(self, split: Split, decide: Decide, kept: np.ndarray | None) -> RuntimeMeasurement:
        problem = self.learner.problem
        return measure_runtime(problem.gated, decide, split.batches(BATCH), kept=kept, dtype=problem.dtype)

    def _offset(self, make: Callable[[float], Decide], kept: np.ndarray) -> float:
        """The number that, added to every share, brings the mean macs on the search split to the budget."""
        if self.learner.config.runtime_trust == 0:
            return 0.0  # nothing is left to the runtime decision, and the static shares meet the budget
        limit, low, high = self.learner.budget.limit, -0.5, 0.5
        for step in range(HALVINGS):
            self.tell(step, HALVINGS, "meeting the budget")
            middle = (low + high) / 2
            over = self._measure(self.task.search, make(middle), kept).macs.mean() > limit
            low, high = (low, middle) if over else (middle, high)
        return low

    def _shares(self, decide: Any) -> np.ndarray:
        """`[layers, images]` shares that the learned decisions ask for on the search split."""
        shares: list[np.ndarray] = []
        problem = self.learner.problem
        for images, labels in self.task.search.batches(BATCH):
            measure_runtime(problem.gated, decide, [(images, labels)], dtype=problem.dtype)
            shares.append(np.stack(decide.passage.keeps))
        return np.concatenate(shares, axis=1)


def stored_plan(learner: RuntimeLearner, statics: Sequence[float] | None) -> Plan:
    """The channels that static shares leave; all of them without any."""
    gated = learner.problem.gated
    keeps = (1.0,) * len(gated.names) if statics is None else statics
    return plan_of(gated, static_decisions(gated, keeps, learner.problem.trust))


def redeployed(folder: Path, config: RuntimeTrainConfig, budget: float) -> tuple[DeployedNetwork, Plan]:
    """The network of a finished run at another budget: its agents are asked anew.

    Args:
        folder: The run's folder.
        config: The run's.
        budget: Share of the dense macs, or a number of macs. It is what agents are told; the run's own offset stays.

    Raises:
        ValueError: A budget that cannot be reached, or a file that is corrupt.
    """
    task = task_of(config)
    learner = RuntimeLearner(task, config, folder)
    learner.restore()
    offset = RuntimeReporter(task, learner, folder, lambda *_: None).recorded()["learned"]["offset"]
    network = deployed_network(learner, offset=offset, budget=budget)
    return network, stored_plan(learner, learner.statics(learner.problem.budget_of(budget)))
