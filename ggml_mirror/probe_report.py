"""What the probe found, and its JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .device import Device
from .dtype import FeatureDtype
from .fidelity import Snr, TapProfile
from .model_info import ModelInfo
from .prompt_run import Run
from .row_kind import RAW

_DEFINITIONS = {
    "snr": "10 log10(sum x^2 / sum (x - y)^2), x: the reference row, y: the row read back; null is infinite",
    "median_db, p5_db": "over the ratios of single rows",
    "energy_db": "of the sums over all rows",
    "exact": "every value that was read back has the bits of the reference",
    "reference": "a further F32 mirror that captured the same evaluations; f32 itself is measured against it too",
    "us_per_row": "time in the mirror's write or read calls, median over evaluations or reads weighted by their rows",
    "capture_prefill, capture_decode": "prompts, a ubatch at a time; generated tokens, one at a time",
    "gb_per_s": "10^9 bytes: (F32 row + stored row) / time",
    "context_bytes": "stored rows for every position of the model's full context",
    "over_f16": "finite values with |x| > 65504, before they are stored",
    "clamped": "finite values beyond the dtype's limit, stored as the limit, per tap",
    "row_kind": "raw: the taps' outputs; fused: rms_norm(fc @ raw) * hidden_norm of a draft, under taps as one of layer null",
    "crest": "sqrt(32 sum max^2 / sum x^2) over a row's blocks of 32, median over rows: 2.4 for normally distributed values, 5.7"
    " where one value holds all energy",
}


@dataclass(frozen=True)
class Speed:
    """What moving a row took: the median over calls, each weighted by its rows, so that busy moments do not count."""

    rows: int
    us_per_row: float
    bytes_per_row: int  # F32 row + stored row: one is read, the other written

    @classmethod
    def of(cls, calls: Sequence[tuple[int, int]], bytes_per_row: int) -> Speed:
        """From (rows, nanoseconds) of each call."""
        total = sum(rows for rows, _ in calls)
        passed = 0
        for each, rows in sorted((ns / rows, rows) for rows, ns in calls):
            passed += rows
            if 2 * passed >= total:
                return cls(total, each / 1e3, bytes_per_row)
        return cls(0, 0.0, bytes_per_row)

    @property
    def gb_per_s(self) -> float:
        return self.bytes_per_row / self.us_per_row / 1e3 if self.us_per_row else 0.0

    def to_json(self) -> dict[str, Any] | None:
        """None if no row was moved."""
        return {"rows": self.rows, "us_per_row": self.us_per_row, "gb_per_s": self.gb_per_s} if self.rows else None


@dataclass(frozen=True)
class DtypeReport:
    """One dtype: what it costs and what it does to the rows.

    Attributes:
        row_bytes: one stored row.
        context_bytes: as many stored rows as the model's full context has tokens.
        snr: over whole rows.
        tap_snr: per tap, in the order of the taps.
        clamped: per tap, finite values beyond what the dtype can hold, stored as its limit.
        prefill, decode: capture of prompts (a batch at a time) and of generated tokens (one at a time).
        read: rows back to F32.
    """

    dtype: FeatureDtype
    row_bytes: int
    context_bytes: int
    snr: Snr
    tap_snr: tuple[Snr, ...]
    clamped: tuple[int, ...]
    prefill: Speed
    decode: Speed
    read: Speed


@dataclass(frozen=True)
class ProbeReport:
    """What :func:`probe` found.

    Attributes:
        width: values in a row.
        row_kind: "raw" or "fused".
        layers: the tapped blocks.
        taps: a profile for each of them; of fused rows, one.
    """

    model: ModelInfo
    device: Device
    n_ctx: int
    rows: int
    dtypes: tuple[DtypeReport, ...]
    taps: tuple[TapProfile, ...]
    runs: tuple[Run, ...]
    width: int
    row_kind: str = RAW
    layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values: sizes in bytes, ratios in dB, null for infinite."""
        info = self.model
        return {
            "model": {
                "path": str(info.path),
                "name": info.name,
                "arch": info.arch,
                "n_layer": info.n_layer,
                "n_embd": info.n_embd,
                "n_ctx_train": info.n_ctx_train,
                "file_bytes": info.n_bytes,
            },
            "device": {"name": self.device.name, "description": self.device.description},
            "n_ctx": self.n_ctx,
            "rows": self.rows,
            "width": self.width,
            "row_kind": self.row_kind,
            "layers": list(self.layers),
            "reference": "f32",
            "dtypes": {
                d.dtype.value: {
                    "row_bytes": d.row_bytes,
                    "context_bytes": d.context_bytes,
                    "snr": d.snr.to_json(),
                    "tap_snr": [
                        {"layer": tap.layer, **snr.to_json()} for tap, snr in zip(self.taps, d.tap_snr, strict=True)
                    ],
                    "clamped": list(d.clamped),
                    "capture_prefill": d.prefill.to_json(),
                    "capture_decode": d.decode.to_json(),
                    "read": d.read.to_json(),
                }
                for d in self.dtypes
            },
            "taps": [
                {
                    "layer": tap.layer,
                    "abs_max": tap.abs_max,
                    "over_f16": tap.over_f16,
                    "nan": tap.nan,
                    "inf": tap.inf,
                    "top_channel": tap.top_channel,
                    "top_channel_energy": tap.top_channel_energy,
                    "crest": tap.crest,
                }
                for tap in self.taps
            ],
            "runs": [
                {
                    "prompt": run.name,
                    "style": run.style,
                    "prompt_tokens": run.prompt_tokens,
                    "cut_tokens": run.cut_tokens,
                    "generated_tokens": run.generated_tokens,
                    "text": run.text,
                }
                for run in self.runs
            ],
            "notes": list(self.notes),
            "definitions": _DEFINITIONS,
        }
