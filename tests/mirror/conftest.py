"""The matrix that the mirror's tests run through: feature dtype x place.

Rows of the tests that run through all dtypes are a multiple of 256 values wide: CUDA reads iq4_nl only so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggml_mirror import FeatureDtype, FeatureMirror, capture

from .ggml_tensors import Tensors
from .places import Place, place_params

REAL_TAPS = (1, 10, 19, 27)  # early to late blocks of the demo target
REAL_N_EMBD = 576


@pytest.fixture(params=place_params())
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.fixture(params=list(FeatureDtype), ids=str)
def dtype(request: pytest.FixtureRequest) -> FeatureDtype:
    return request.param


@pytest.fixture
def tensors() -> Iterator[Tensors]:
    with Tensors() as t:
        yield t


@pytest.fixture(autouse=True)
def supported(request: pytest.FixtureRequest) -> None:
    """Skip a (dtype, place) that the device cannot hold; test_support.py holds that such a mirror is refused."""
    if {"dtype", "place"} <= set(request.fixturenames):
        dtype, place = request.getfixturevalue("dtype"), request.getfixturevalue("place")
        if not place.supports(dtype):
            pytest.skip(f"{place.device} cannot hold {dtype}")


@pytest.fixture(scope="session")
def real_rows(demo_target: Path) -> np.ndarray:
    """Rows that the demo target really computes, float32 [n, 4 * 576]."""
    from llama_cpp import Llama

    prompt = b"def largest(numbers):\n    # the largest of a list, or None\n    best = None\n    for n in numbers:\n"
    llm = Llama(str(demo_target), n_ctx=256, n_threads=2, verbose=False)
    try:
        tokens = llm.tokenize(prompt)
        with FeatureMirror(taps=len(REAL_TAPS), n_embd=REAL_N_EMBD, cap=256, dtype="f32") as m:
            with capture(llm, m, REAL_TAPS):
                llm.eval(tokens)
            rows = m.read(start=0, count=len(tokens))
    finally:
        llm.close()
    assert np.abs(rows).max() > 100, "real rows have massive channels"
    return rows
