"""Which row a mirror is planned for: numbers, or what a target or draft GGUF file says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .errors import ArgumentError
from .model_info import DEFAULT_N_TAPS, ModelInfo, default_taps
from .row_kind import FUSED, RAW, parse_rows

DEFAULT_CAP = 4096  # where no model says how long its context is


@dataclass(frozen=True)
class RowSource:
    """Arguments for :func:`ggml_mirror.plan.plan`, and the name of the model that they come from."""

    width: int | None
    taps: int | None
    n_embd: int | None
    cap: int
    source: str = ""
    rows: str = RAW
    draft_n_embd: int | None = None


def row_source(
    *,
    width: int | None = None,
    taps: int | None = None,
    n_embd: int | None = None,
    model: Path | None = None,
    draft: Path | None = None,
    cap: int | None = None,
    rows: str = RAW,
) -> RowSource:
    """From numbers, a target (its default taps, or ``taps`` of them), a draft, or a draft with its target.

    ``cap`` None: the context of the target, else of the draft, else 4096. ``rows`` "fused": one tap, as wide as the draft (a width
    alone is that of a fused row; without a draft, drafts are as wide as their target).

    Raises:
        ArgumentError: sources that contradict each other, or a target where a draft belongs, or the reverse.
        ModelFileError: a file that cannot be read.
    """
    raw = _raw_source(width, taps, n_embd, model, draft, cap)
    if parse_rows(rows) == RAW:
        return raw
    if draft is not None:
        return replace(raw, taps=1, n_embd=ModelInfo.read(draft).n_embd, rows=FUSED)
    if raw.width is None:
        return replace(raw, taps=1, rows=FUSED)
    wide = raw.width if raw.taps is None and raw.n_embd is None else raw.n_embd or raw.width // (raw.taps or 1)
    return replace(raw, width=None, taps=1, n_embd=wide, rows=FUSED)


def _raw_source(
    width: int | None, taps: int | None, n_embd: int | None, model: Path | None, draft: Path | None, cap: int | None
) -> RowSource:
    if model is None and draft is None:
        if taps is None and width is None and n_embd is not None:
            taps = DEFAULT_N_TAPS
        return RowSource(width, taps, n_embd, DEFAULT_CAP if cap is None else cap)
    if width is not None or n_embd is not None:
        raise ArgumentError("give the row's width, or a GGUF file that says it, not both")
    target = None if model is None else ModelInfo.read(model)
    if target is not None and target.is_draft:
        raise ArgumentError(f"{target.path}: a draft; give it with -md")
    if draft is not None:
        return _of_draft(ModelInfo.read(draft), target, taps, cap)
    assert target is not None
    taps = len(default_taps(target.n_layer)) if taps is None else taps
    return RowSource(None, taps, target.n_embd, target.n_ctx_train if cap is None else cap, target.name)


def _of_draft(info: ModelInfo, target: ModelInfo | None, taps: int | None, cap: int | None) -> RowSource:
    if info.draft is None:
        raise ArgumentError(f"{info.path}: not a DFlash draft (architecture {info.arch!r}); give a target with -m")
    n_taps = info.draft.n_taps
    n_embd = info.draft.row_width // n_taps
    if taps not in (None, n_taps):
        raise ArgumentError(f"{info.path}: reads {n_taps} taps, not {taps}")
    if target is not None and target.n_embd != n_embd:
        raise ArgumentError(f"{info.path}: reads taps of {n_embd} values, those of {target.path} have {target.n_embd}")
    context = (target or info).n_ctx_train
    return RowSource(None, n_taps, n_embd, context if cap is None else cap, info.name, draft_n_embd=info.n_embd)
