"""What all tests share: a fixed hypothesis profile, a clean dtype policy, and the demo target."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_run import Result, Run
from hypothesis import HealthCheck, Phase, settings

from ggml_mirror.dtype import DTYPE_VARIABLE

# The same examples on every machine. GGML_MIRROR_HYPOTHESIS=explore draws new ones, ten times as many.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.register_profile("explore", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("GGML_MIRROR_HYPOTHESIS", "repeatable"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``, as ``make test`` has it: the cores that this process may use."""
    return len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def no_dtype_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's DFLASH_FEATURE_DTYPE must not change what a test means."""
    monkeypatch.delenv(DTYPE_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def demo_target() -> Path:
    """The GGUF of the demo target; `make test` fetches it."""
    default = Path.home() / ".cache/ggml-mirror/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("GGML_MIRROR_DEMO_TARGET") or default)
    if not path.is_file():
        pytest.skip(f"no demo target at {path}; set GGML_MIRROR_DEMO_TARGET")
    return path


@pytest.fixture(scope="session")
def demo_draft() -> Path:
    """The demo's draft, which the checkout has."""
    return Path(__file__).parents[1] / "models" / "smollm2-135m-instruct-dflash-q8_0.gguf"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process."""
    from ggml_mirror import cli

    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(end.value.code or 0, captured.out, captured.err)

    return run
