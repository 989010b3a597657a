"""The command: any stages of the study, in order."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from agents.cli import INTERRUPTED, guarded, parse
from benchmarks.lasting import plans as plan_recipes
from benchmarks.lasting import predictors, report, scores, truth
from benchmarks.lasting.candidates import tables
from benchmarks.lasting.short import Short
from benchmarks.lasting.study import Job, Settings, Study, make_all
from prune_env.tasks.progress import progress_bar

PROGRAM = "python -m benchmarks.lasting"
Stage = Literal["plans", "truth", "scores", "report", "predictors"]


@dataclass(frozen=True)
class Arguments(Settings):
    """Which score of a pruned network tells what it is worth after fine-tuning?

    The same command goes on where a stopped one was, and may run several times at once on the same folder.
    """

    stage: tuple[Stage, ...] = ("plans", "truth", "scores", "report", "predictors")
    """What is made. Truth and scores are of the plans that are made by then, predictors are learned from both."""
    out: Path = Path("runs/records/lasting-cifar10-resnet20")
    """Folder of the records."""
    plans: tuple[str, ...] = ()
    """Names of plans, at every budget; by default all at the first budget and the core at the others."""
    again: int = 8
    """Every plan of this many is fine-tuned from a second seed; 0 for none."""
    short: tuple[str, ...] = ("20@.01", "20@.02", "20@.05", "50@.02", "50@.05", "100@.05", "300@.05")
    """Short trainings that are scores, as STEPS@LR; each is measured at the steps of the shorter ones, too.
    Records are filled up when more are asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.again < 0:
            raise ValueError(f"again is {self.again}; 0 or more is allowed")
        plan_recipes.check_names(self.plans)
        for text in self.short:
            Short.parse(text)

    @property
    def settings(self) -> Settings:
        """What decides the records."""
        return Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})


def run(arguments: Arguments) -> int:
    """Make the stages that are asked for.

    Raises:
        ValueError: A value that is not allowed, or a folder that is for something else.
        OSError: Missing data, or a folder that cannot be written.
    """
    torch.set_num_threads(1)
    study = Study(arguments.settings, arguments.out)
    with progress_bar("lasting") as tell:
        study = replace(study, progress=tell)
        for stage in ("plans", "truth", "scores"):
            if stage in arguments.stage:
                make_all(_jobs(stage, study, arguments), told=tell)
    if "report" in arguments.stage:
        print(report.write_report(study.folder, study.settings))
    if "predictors" in arguments.stage:
        for file in predictors.write_predictors(study, tables(study.folder, study.settings)):
            print(f"for --reward predicted: --predictor {file}")
    return 0


def _jobs(stage: str, study: Study, arguments: Arguments) -> list[Job]:
    if stage == "plans":
        return plan_recipes.jobs(study, only=arguments.plans)
    if stage == "truth":
        return truth.jobs(study, again=arguments.again)
    return scores.jobs(study, tuple(Short.parse(text) for text in arguments.short))


def main(words: list[str] | None = None) -> int:
    """Entry point; exit code 2 for bad input, 130 when interrupted."""
    try:
        return guarded(lambda: run(parse(Arguments, sys.argv[1:] if words is None else words, program=PROGRAM)))
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
