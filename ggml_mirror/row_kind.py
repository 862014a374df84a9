"""What a row of a mirror holds."""

from __future__ import annotations

from .dtype import AUTO
from .errors import ArgumentError

#: The tapped outputs of a position, concatenated: ``n_taps * n_embd`` values.
RAW = "raw"

#: What all layers of a draft read of them, ``rms_norm(fc @ raw) * hidden_norm``: the draft's ``n_embd`` values.
FUSED = "fused"


def parse_rows(rows: str) -> str:
    """Raise ArgumentError unless it is a kind of rows."""
    if rows not in (RAW, FUSED):
        where = f"; {AUTO} needs a target and a draft to weigh" if rows == AUTO else ""
        raise ArgumentError(f"rows are {RAW} or {FUSED}, not {rows!r}{where}")
    return rows


def parse_rows_choice(rows: str) -> str | None:
    """As :func:`parse_rows`, for places that can choose themselves: None for "auto"."""
    if isinstance(rows, str) and rows.strip().lower() == AUTO:
        return None
    if rows not in (RAW, FUSED):
        raise ArgumentError(f"rows are {RAW}, {FUSED} or {AUTO}, not {rows!r}")
    return rows
