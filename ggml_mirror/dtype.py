"""The feature dtype: the ggml type in which rows are stored, and its policy variable."""

from __future__ import annotations

import operator
import os
from enum import Enum

from ._native import check, ffi, lib
from .errors import ArgumentError, DtypeError, ShapeError

#: Environment variable that sets the default feature dtype wherever one may be given.
DTYPE_VARIABLE = "DFLASH_FEATURE_DTYPE"

#: In place of a dtype's name, where a target and a draft are given: the most precise one that memory allows (see ``budget``).
AUTO = "auto"


class FeatureDtype(str, Enum):
    """ggml types that a mirror can hold, most precise first. Compares equal to its name: ``FeatureDtype.Q8_0 == "q8_0"``."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"
    IQ4_NL = "iq4_nl"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, name: str | FeatureDtype) -> FeatureDtype:
        """The dtype of that name, in any case.

        Raises:
            DtypeError: unknown; the message lists the good names.
        """
        return _parse(name, "")

    @classmethod
    def default(cls) -> FeatureDtype:
        """The dtype that ``DFLASH_FEATURE_DTYPE`` names, else f32.

        Raises:
            DtypeError: the variable holds an unknown name.
        """
        name = os.environ.get(DTYPE_VARIABLE, "")
        return _parse(name, f"{DTYPE_VARIABLE}: ") if name.strip() else cls.F32

    @classmethod
    def resolve(cls, dtype: str | FeatureDtype | None) -> FeatureDtype:
        """An explicit dtype wins; None means :meth:`default`."""
        return cls.default() if dtype is None else cls.parse(dtype)

    @classmethod
    def resolve_choice(cls, dtype: str | FeatureDtype | None) -> FeatureDtype | None:
        """As :meth:`resolve`, for places that can choose themselves: None if "auto" was asked for, here or by the variable."""
        asked = os.environ.get(DTYPE_VARIABLE) if dtype is None else dtype
        return None if _is_auto(asked) else cls.resolve(dtype)

    @property
    def ggml_type(self) -> int:
        """ggml's own number for this type."""
        number: int = lib.gm_type_from_name(self.value.encode())
        if number < 0:
            raise DtypeError(f"the loaded ggml has no type {self.value!r}")
        return number

    @property
    def block_size(self) -> int:
        """Values per block; a tap's width must be a multiple of it."""
        out = ffi.new("int64_t *")
        check(lib.gm_type_block_size(self.ggml_type, out))
        return int(out[0])

    @property
    def limit(self) -> float:
        """Largest ``|x|`` that comes back finite: 65504 for f16; larger values are clamped to it and counted."""
        out = ffi.new("float *")
        check(lib.gm_type_limit(self.ggml_type, out))
        return float(out[0])


def row_bytes(dtype: str | FeatureDtype, width: int) -> int:
    """Bytes that ggml takes to store ``width`` values in ``dtype``.

    >>> row_bytes("q8_0", 25600)
    27200

    Raises:
        DtypeError: unknown dtype.
        ShapeError: ``width`` is not a positive multiple of the dtype's block size.
    """
    out = ffi.new("uint64_t *")
    check(lib.gm_type_row_size(FeatureDtype.parse(dtype).ggml_type, _width(width), out))
    return int(out[0])


def _width(width: int) -> int:
    try:
        number = operator.index(width)
    except TypeError:
        raise ArgumentError(f"width must be an integer, not {width!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ShapeError(f"width {number} is beyond 64 bits")
    return number


def _parse(name: str | FeatureDtype, prefix: str) -> FeatureDtype:
    if isinstance(name, FeatureDtype):
        return name
    if isinstance(name, str):
        try:
            return FeatureDtype(name.strip().lower())
        except ValueError:
            pass
    good = ", ".join(d.value for d in FeatureDtype)
    if _is_auto(name):
        raise DtypeError(
            f"{prefix}{AUTO} weighs a target and a draft against memory; that is possible in DFlashLlama, "
            f"`ggml-mirror run` and `ggml-mirror serve`. Here name one of {good}"
        )
    raise DtypeError(f"{prefix}unknown feature dtype {name!r}; use one of {good}")


def _is_auto(name: object) -> bool:
    return isinstance(name, str) and name.strip().lower() == AUTO
