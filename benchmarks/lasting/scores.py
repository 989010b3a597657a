"""Candidate scores of a plan: what each says before the fine-tuning, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from torch import Tensor

from baselines.heuristics import errors_of
from baselines.method import Method, case_of
from benchmarks.lasting.errors import error_sums
from benchmarks.lasting.proxies import PROXIES
from benchmarks.lasting.quality import quality
from benchmarks.lasting.short import Entry, Short, trained
from benchmarks.lasting.study import Job, Record, Study, read, save, timed
from prune_env.envs.widths import widths
from prune_env.number_format import number_format
from prune_env.pruning.evaluator import Evaluator
from prune_env.pruning.measure import prepare_images
from prune_env.pruning.plan import Plan

REPAIRS = {"cut": ("none", False), "recalibrated": ("none", True), "refit": ("moments", True)}
"""Family -> refit, and whether statistics are recalibrated, before accuracy, loss and margin are measured."""
PROXY_IMAGES = 64
"""Training images that a proxy sees, unchanged."""


def jobs(study: Study, shorts: tuple[Short, ...]) -> list[Job]:
    """The scores of all plans that are made; a record to which short trainings are missing is filled up."""
    bench = Bench(study)
    return [_job(bench, plan, shorts) for plan in study.plans()]


def _job(bench: Bench, plan: Record, shorts: tuple[Short, ...]) -> Job:
    file = bench.study.path("scores", plan["name"])

    def known() -> dict[str, Entry]:
        return read(file)["families"] if file.exists() else {}

    def missing() -> list[tuple[str, Callable[[], Mapping[str, Entry]]]]:
        return [(name, make) for name, make in bench.families(plan, shorts).items() if name not in known()]

    def make() -> None:
        for name, families in missing():
            bench.tell(f"{plan['name']}: {name}")
            save(file, {"plan": plan["name"], "families": {**known(), **families()}})

    return Job(file, lambda: not missing(), make)


class Bench:
    """A study with its search images and its calibration batch at hand.

    Args:
        study: Its plans are made.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._curves: dict[tuple[str, str], list[np.ndarray]] = {}
        self._search: tuple[Tensor, Tensor] | None = None

    def tell(self, text: str) -> None:
        """Tell the study's progress what is under way."""
        if self.study.progress is not None:
            self.study.progress(0, 1, text)

    @property
    def search(self) -> tuple[Tensor, Tensor]:
        """Images of the search split, prepared once, and labels."""
        if self._search is None:
            images, labels = self.study.task.search.take(len(self.study.task.search))
            dtype = number_format(self.study.task.network, images)
            self._search = prepare_images(images, device="cpu", dtype=dtype), labels
        return self._search

    def families(self, plan: Record, shorts: tuple[Short, ...]) -> dict[str, Callable[[], Mapping[str, Entry]]]:
        """Name -> makes the entries of a family of scores: what costs the same because it is found together."""
        found: dict[str, Callable[[], Mapping[str, Entry]]] = {
            "widths": partial(self._widths, plan),
            "curves": partial(self._error_curves, plan),
        }
        found |= {name: partial(self._measured, plan, name) for name in REPAIRS}
        found |= {name: partial(self._proxy, plan, name) for name in PROXIES}
        for short in sorted(shorts):
            stops = {other.steps for other in shorts if other.steps < short.steps}
            found[short.name] = partial(self._trained, plan, short, stops)
        return found

    def _widths(self, plan: Record) -> dict[str, Entry]:
        problem = self.study.problem(plan["importance"], plan["repair"])
        values, cost = timed(lambda: widths(problem.graph, problem.steps, np.array(plan["counts"])))
        return {"widths": {**cost, "values": values}}

    def _error_curves(self, plan: Record) -> dict[str, Entry]:
        """Curves are made once for the network, so that a plan only pays for looking them up."""
        key = plan["importance"], plan["repair"]
        problem = self.study.problem(*key)
        if key not in self._curves:
            self._curves[key] = errors_of(case_of(Method("curves", ""), problem))
        levels = [int(np.searchsorted(a, n)) for a, n in zip(problem.allowed, plan["counts"], strict=True)]
        values, cost = timed(lambda: error_sums(self._curves[key], levels))
        return {"curves": {**cost, "values": values}}

    def _measured(self, plan: Record, family: str) -> dict[str, Entry]:
        refit, recalibrated = REPAIRS[family]
        problem = self.study.problem(plan["importance"], plan["repair"])
        known = problem.evaluator
        evaluator = Evaluator(
            known.network,
            problem.graph,
            known.meter,
            calibration=known.calibration,
            recalibrate=recalibrated,
            refit=refit,
            moments=known.moments,
        )
        values, cost = timed(lambda: quality(evaluator.realise(Plan(plan["keep"])), *self.search))
        return {family: {**cost, "values": values}}

    def _proxy(self, plan: Record, name: str) -> dict[str, Entry]:
        images, labels = self.study.task.calibration(PROXY_IMAGES)
        value, cost = timed(lambda: PROXIES[name](self.study.realised(plan), images, labels))
        return {name: {**cost, "values": {"score": value}}}

    def _trained(self, plan: Record, short: Short, stops: set[int]) -> dict[str, Entry]:
        return trained(self.study, plan, short, search=self.search, stops=stops)
