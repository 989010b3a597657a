"""What every test relies on: no network, no user cache, the same seeds, the data folder only where one is named."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: figures need no display, and two OpenMP pools on two cores stall each other.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import typechecks

typechecks.install()

# Times vary on shared machines, so a slow example is no failure; derandomised, so that a red run can be repeated.
settings.register_profile(
    "prune_env", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("prune_env")

DATA = os.environ.get("PRUNE_ENV_DATA")
WEIGHTS = os.environ.get("PRUNE_ENV_WEIGHTS")


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    """Global generators start alike in every test, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test fills the user's cache, and no fast test reads it: an empty machine and a used one give the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if "not slow" in request.config.getoption("markexpr"):
            patch.delenv("PRUNE_ENV_DATA", raising=False)
        yield


@pytest.fixture
def data_root() -> Path:
    """The user's data folder, for slow tests on real data; skips where `PRUNE_ENV_DATA` is not set."""
    return _folder(DATA, "PRUNE_ENV_DATA")


@pytest.fixture
def weights_root() -> Path:
    """The folder of trained weights, for slow tests; skips where `PRUNE_ENV_WEIGHTS` is not set."""
    return _folder(WEIGHTS, "PRUNE_ENV_WEIGHTS")


def _folder(value: str | None, variable: str) -> Path:
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} names no folder")
    return Path(value)
