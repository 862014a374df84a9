"""Fused capture: raw rows wait until they are committed, then become fused rows of a mirror.

Raw rows live only in a staging ring on the draft's device. Of an evaluation that it holds, rows that are rejected leave it without
having been in the mirror. Of a longer one, a prompt, older rows are fused as newer ones arrive; those that are taken back leave the mirror.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from ._native import check, ffi, lib
from .draft import Draft
from .dtype import FeatureDtype
from .errors import ArgumentError, ClosedError
from .mirror import FeatureMirror, _int64
from .row_kind import FUSED


class Fuser:
    """What :func:`ggml_mirror.capture.capture` writes to for a mirror of fused rows.

    Args:
        draft: made with ``rows="fused"``; it computes on its own device.
        mirror: of fused rows, on that device.
        staging: slots for raw rows, F32 (see :func:`ggml_mirror.draft_memory.staging_cap`): as many as the longest evaluation of
            which nothing may enter the mirror before it is committed, twice that if another waits then. By ``callback`` also as many as
            a micro-batch has tokens: CaptureError, where more arrive.
        n_threads: for the staging ring on host devices; 0 takes all cores.

    Raises:
        ArgumentError, ShapeError: draft or mirror are not of fused rows, or of other widths.
        MirrorMemoryError: the staging ring does not fit.
    """

    def __init__(self, draft: Draft, mirror: FeatureMirror, *, staging: int, n_threads: int = 0) -> None:
        for what, rows in (("draft", draft.rows), ("mirror", mirror.rows)):
            if rows != FUSED:
                raise ArgumentError(f'the {what} is of {rows} rows; make it with rows="{FUSED}"')
        spec = draft.spec
        self.draft, self.mirror = draft, mirror
        self.taps, self.n_embd = len(spec.taps), spec.n_embd_target
        self.staging = FeatureMirror(
            taps=self.taps,
            n_embd=self.n_embd,
            cap=staging,
            dtype=FeatureDtype.F32,
            device=draft.device.name,
            n_threads=n_threads,
        )
        out = ffi.new("gm_fuser **")
        check(lib.gm_fuser_new(draft._open(), self.staging._open(), mirror._open(), out))
        # The native fuser points to all three.
        keep = (draft._handle, self.staging._handle, mirror._handle)
        self._handle: Any = ffi.gc(out[0], lambda fuser, keep=keep: lib.gm_fuser_free(fuser))

    def commit(self, end: int) -> None:
        """Rows before position ``end`` are there to stay: fuse those that wait. A capture does so for all before each evaluation."""
        check(lib.gm_fuser_commit(self._open(), _int64(end, "end")))

    def truncate(self, start: int) -> None:
        """Forget positions >= ``start``, waiting or fused."""
        check(lib.gm_fuser_truncate(self._open(), _int64(start, "start")))

    def clear(self) -> None:
        """Forget every position."""
        self.truncate(0)
        self.mirror.clear()

    @property
    def closed(self) -> bool:
        return self._handle is None or self.mirror.closed

    def close(self) -> None:
        """Free the staging ring; draft and mirror stay."""
        self._handle = None
        self.staging.close()

    def __enter__(self) -> Fuser:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self._handle is None:
            raise ClosedError("this Fuser is closed; make a new one")
        self.mirror._open()
        self.draft._open()
        return self._handle
