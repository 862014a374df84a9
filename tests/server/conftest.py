"""A server over a tiny pair, shared by the tests that leave it as it was, and the demo pair's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
pytest.importorskip("openai")

from .process import ServerProcess, write_tiny_pair


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Target and draft."""
    return write_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def server(tiny: tuple[Path, Path]) -> Iterator[ServerProcess]:
    with ServerProcess("-m", tiny[0], "-md", tiny[1]) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="session")
def demo_server(demo_target: Path, demo_draft: Path) -> Iterator[ServerProcess]:
    with ServerProcess("-m", demo_target, "-md", demo_draft, "--feature-dtype", "q8_0", exact=False) as running:
        yield running
