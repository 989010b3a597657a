"""What all tests of methods share."""

from __future__ import annotations

import pytest

from baselines import METHODS
from baselines.search import OPTIMISERS, search_method


@pytest.fixture(autouse=True)
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold at any number of evaluations, and a few keep the tests of all methods fast."""
    for name in OPTIMISERS:
        monkeypatch.setitem(METHODS, name, search_method(name, evaluations=8))
