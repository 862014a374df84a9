"""DFLASH_FEATURE_DTYPE is the default dtype; an explicit one wins; a bad value is an error that lists the good ones."""

from __future__ import annotations

import pytest

from ggml_mirror import FeatureDtype
from ggml_mirror.dtype import DTYPE_VARIABLE
from ggml_mirror.errors import DtypeError
from ggml_mirror.mirror import mirror_size

from . import reference
from .places import CPU_LOOPS

SHAPE = {"taps": 1, "n_embd": 64, "cap": 4}


def dtype_of_a_mirror(**arguments: object) -> FeatureDtype:
    with CPU_LOOPS.mirror(**SHAPE, **arguments) as m:
        assert m.row_nbytes == reference.row_bytes(m.dtype, 64)
        return m.dtype


def test_variable_has_the_documented_name() -> None:
    assert DTYPE_VARIABLE == "DFLASH_FEATURE_DTYPE"


def test_default_is_f32() -> None:
    assert dtype_of_a_mirror() is FeatureDtype.F32
    assert dtype_of_a_mirror(dtype=None) is FeatureDtype.F32


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_empty_variable_is_no_choice(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(DTYPE_VARIABLE, text)
    assert dtype_of_a_mirror() is FeatureDtype.F32


@pytest.mark.parametrize("spelling", [str, str.upper, lambda s: f" {s}\n"], ids=["as is", "upper case", "with blanks"])
def test_variable_sets_the_default(monkeypatch: pytest.MonkeyPatch, dtype: FeatureDtype, spelling: object) -> None:
    monkeypatch.setenv(DTYPE_VARIABLE, spelling(dtype.value))  # type: ignore[operator]
    assert dtype_of_a_mirror() is dtype
    assert mirror_size(1, 64, 4).row == reference.row_bytes(dtype, 64)


def test_variable_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("q8_0", "bf16"):
        monkeypatch.setenv(DTYPE_VARIABLE, name)
        assert dtype_of_a_mirror() == name


@pytest.mark.parametrize("variable", ["f16", "nonsense"])
def test_explicit_dtype_wins(monkeypatch: pytest.MonkeyPatch, dtype: FeatureDtype, variable: str) -> None:
    monkeypatch.setenv(DTYPE_VARIABLE, variable)
    for explicit in (dtype, dtype.value, dtype.value.upper()):
        assert dtype_of_a_mirror(dtype=explicit) is dtype


@pytest.mark.parametrize("text", ["q8", "fp16", "F-16", "q8_0,f16", "none", "0"])
def test_bad_value_is_an_error_that_lists_the_good_ones(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(DTYPE_VARIABLE, text)
    for use in (dtype_of_a_mirror, lambda: mirror_size(1, 64, 4)):
        with pytest.raises(DtypeError) as caught:
            use()
        assert str(caught.value).startswith(f"{DTYPE_VARIABLE}: ") and repr(text) in str(caught.value)
        assert ", ".join(d.value for d in FeatureDtype) in str(caught.value)


def test_names_are_those_of_ggml() -> None:
    for d in FeatureDtype:
        assert d == d.value and str(d) == d.value
        assert d.ggml_type == reference.gguf_type(d).value
        assert d.block_size == reference.BLOCK if d not in reference.PLAIN else d.block_size == 1
