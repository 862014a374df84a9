"""The tiny pair and the demo pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from .pair import TARGETS, Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(params=list(TARGETS))
def name(request: pytest.FixtureRequest) -> str:
    """Each architecture and way of rolling back."""
    return str(request.param)


@pytest.fixture(scope="session")
def demo_draft() -> Path:
    return Path(__file__).parents[2] / "models" / "smollm2-135m-instruct-dflash-q8_0.gguf"
