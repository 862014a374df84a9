"""The tiny pair, on each target."""

from __future__ import annotations

import pytest

from .pair import TARGETS, Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(params=list(TARGETS))
def name(request: pytest.FixtureRequest) -> str:
    """Each architecture and way of rolling back."""
    return str(request.param)
