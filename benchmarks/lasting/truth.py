"""The truth: what each plan is worth after one fixed fine-tuning, on images that nothing else has seen."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.lasting.study import Job, Record, Study, save, timed
from prune_env.number_format import number_format
from prune_env.pruning.measure import Meter
from prune_env.tasks.training import train


def jobs(study: Study, *, again: int) -> list[Job]:
    """The fine-tunings of a study: one of each plan, then a second one of a few, which shows the noise.

    Args:
        study: Its plans are made.
        again: A second seed for every plan of this many, budget by budget; 0 for none.
    """
    plans = study.plans()
    return [_job(study, plan, 0) for plan in plans] + [_job(study, plan, 1) for plan in repeated(plans, again)]


def repeated(plans: Sequence[Record], again: int) -> list[Record]:
    """Every plan of so many at each budget, from the first on."""
    budgets = dict.fromkeys(plan["budget"] for plan in plans)
    some = [[plan for plan in plans if plan["budget"] == budget][:: again or len(plans)] for budget in budgets]
    return [plan for group in some for plan in group] if again else []


def _job(study: Study, plan: Record, seed: int) -> Job:
    file = study.path("truth", f"{plan['name']}-seed{seed}")
    return Job(file, file.exists, lambda: save(file, fine_tuned(study, plan, seed)))


def fine_tuned(study: Study, plan: Record, seed: int) -> Record:
    """A plan's record: accuracy on the truth images, and on the test split, which nothing is chosen by.

    A fine-tuning that was stopped goes on from its last epoch; its seconds are then those of the rest.

    Args:
        study: The study.
        plan: The plan's record.
        seed: Of order and augmentation; 0 and 1 are far from the dense training's.
    """
    settings, task = study.settings, study.task
    network = study.realised(plan)
    own = study.training(
        epochs=settings.fine_tune_epochs, lr=settings.fine_tune_lr, seed=1000 * (seed + 1) + settings.seed
    )
    checkpoint = study.folder / "truth" / f".{plan['name']}-seed{seed}.safetensors"
    report, cost = timed(
        lambda: train(network, task.train, settings=own, progress=study.progress, checkpoint=checkpoint)
    )
    steps = own.epochs * max(1, len(task.train) // own.batch_size)
    record = {"plan": plan["name"], "seed": seed, "steps": steps}
    for name, split in (("truth", study.truth), ("test", task.test)):
        meter = Meter(*split.take(len(split)), dtype=number_format(network, task.example))
        record[f"{name}_accuracy"], record[f"{name}_loss"] = meter.accuracy_and_loss(network)
    checkpoint.unlink()
    return {**record, "train_losses": list(report.losses), **cost}
