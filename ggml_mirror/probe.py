"""The probe: real prompts through a real model, its features into one mirror per dtype, and what that did to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .capture import Hook, capture
from .device import Device, find_device
from .draft import Draft, DraftSpec
from .draft_memory import row_shape
from .dtype import FeatureDtype
from .errors import ArgumentError, DtypeError, ModelFileError
from .fidelity import SnrMeter, TapMeter, TapProfile
from .mirror import FeatureMirror
from .model_info import ModelInfo, default_taps
from .plan import usable_dtypes
from .probe_report import DtypeReport, ProbeReport, Speed
from .prompt_run import BOTH, DECODE, PREFILL, STYLES, load, make_jobs, run_job
from .prompts import DEFAULT_PROMPTS, Prompt
from .row_kind import FUSED, RAW, parse_rows

if TYPE_CHECKING:
    from llama_cpp import Llama

DEFAULT_N_CTX = 4096
_CHUNK = 512  # rows read and compared at once

Call = tuple[int, int]  # rows, nanoseconds

#: Called with (tokens done, tokens in all, what is running).
Progress = Callable[[int, int, str], None]


def probe(
    model: str | Path,
    *,
    draft: str | Path | None = None,
    rows: str = RAW,
    taps: Sequence[int] | None = None,
    prompts: Sequence[Prompt] = DEFAULT_PROMPTS,
    dtypes: Sequence[str | FeatureDtype] | None = None,
    style: str = BOTH,
    n_predict: int = 32,
    n_ctx: int | None = None,
    n_batch: int = 2048,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    device: str = "auto",
    verbose: bool = False,
    progress: Progress | None = None,
) -> ProbeReport:
    """Run ``prompts`` through ``model`` and measure each dtype on the features that it computes.

    The features are captured in one pass into one mirror per dtype and into one more F32 mirror, the reference that
    every dtype, F32 included, is compared with. Fused rows are made of that reference, by the draft, after each prompt.

    Args:
        draft: a DFlash draft of the model: its taps are taken, and its projection makes fused rows.
        rows: "raw" or "fused", which needs ``draft``.
        taps: 0-based blocks whose outputs are taken; default the draft's, or :func:`~ggml_mirror.model_info.default_taps`.
        dtypes: default: all that fit the model's width and that ``device`` can both capture and read.
        style: "raw", "chat" (wrapped in the model's own template) or "both".
        n_predict: tokens decoded greedily after each prompt, fewer if the model ends its text.
        n_ctx: default: the model's context, at most 4096. Longer prompts are cut, which ``notes`` says.
        device: where the mirrors are: "cpu", "auto", or a ggml device name.

    Raises:
        ArgumentError, ShapeError, DtypeError, DeviceError, ModelFileError: bad input, found before the model is loaded
            where that is possible.
        CaptureError: a tap that the model does not have, or of another width.
        MirrorMemoryError: the mirrors do not fit.
    """
    info = ModelInfo.read(model)
    if info.is_draft:
        raise ModelFileError(f"{info.path}: a draft; the features are those of its target, so probe that")
    spec = _draft_spec(draft, info, parse_rows(rows), taps)
    layers = _checked_taps(taps, info) if spec is None else spec.taps
    _check_options(prompts, style, n_predict, n_ctx, n_batch, n_ubatch, n_threads)
    where = find_device(device)
    n_taps, n_embd = (len(layers), info.n_embd) if spec is None else row_shape(spec, rows)
    chosen, notes = _chosen_dtypes(dtypes, n_embd, where)
    n_ctx = min(info.n_ctx_train, DEFAULT_N_CTX) if n_ctx is None else n_ctx or info.n_ctx_train
    if n_ctx <= n_predict:
        raise ArgumentError(
            f"a context of {n_ctx} tokens has no room for a prompt and {n_predict} more (-c, --n-predict)"
        )

    with (
        load(
            info,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            verbose=verbose,
        ) as llm,
        ExitStack() as stack,
    ):
        jobs, more = make_jobs(llm, prompts, style, limit=n_ctx - n_predict)
        notes += more
        cap = max(len(job.tokens) for job in jobs) + n_predict

        def mirror(dtype: FeatureDtype, taps: int, n_embd: int, rows: str) -> FeatureMirror:
            made = FeatureMirror(
                taps=taps,
                n_embd=n_embd,
                cap=cap,
                dtype=dtype,
                device=where.name,
                n_threads=n_threads or 0,
                rows=rows,
            )
            _warm_up(stack.enter_context(made))
            return made

        mirrors = [mirror(dtype, n_taps, n_embd, rows) for dtype in (FeatureDtype.F32, *chosen)]
        sinks = mirrors if rows == RAW else [mirror(FeatureDtype.F32, len(layers), info.n_embd, RAW)]
        fuse = None
        if spec is not None and rows == FUSED:
            fuse = stack.enter_context(_draft(llm, spec, where, n_threads)).fuse
        meters = _Meters(mirrors, info)
        with capture(llm, sinks, layers):
            runs = []
            total = sum(len(job.tokens) + n_predict for job in jobs)
            done = 0
            for job in jobs:
                if progress:
                    progress(done, total, f"{job.name}, {job.style}")
                run = run_job(llm, job, n_predict, meters.phase if fuse is None else _untimed)
                count = run.prompt_tokens + run.generated_tokens
                if fuse is not None:
                    with meters.phase(PREFILL, count):
                        for fused in mirrors:
                            fuse(sinks[0], fused, start=0, count=count)
                    sinks[0].clear()
                meters.compare(count)
                runs.append(run)
                done += len(job.tokens) + n_predict
            if progress:
                progress(total, total, "done")
        return ProbeReport(
            model=info,
            device=where,
            n_ctx=n_ctx,
            rows=meters.rows,
            dtypes=meters.dtype_reports(),
            taps=meters.tap_profiles(layers if rows == RAW else (None,)),
            runs=tuple(runs),
            width=n_taps * n_embd,
            row_kind=rows,
            layers=tuple(layers),
            notes=tuple(notes),
        )


class _Meters:
    """All that is measured over the mirrors; the first of them is the reference."""

    def __init__(self, mirrors: Sequence[FeatureMirror], info: ModelInfo) -> None:
        self.reference, *self.stored = mirrors
        self.info = info
        self.rows = 0
        self._row = [SnrMeter() for _ in self.stored]
        self._taps = [[SnrMeter() for _ in range(self.reference.taps)] for _ in self.stored]
        self._profiles = [TapMeter(self.reference.n_embd) for _ in range(self.reference.taps)]
        self._captured: dict[str, list[list[Call]]] = {phase: [[] for _ in self.stored] for phase in (PREFILL, DECODE)}
        self._read: list[list[Call]] = [[] for _ in self.stored]

    @contextmanager
    def phase(self, name: str, rows: int) -> Iterator[None]:
        """Time what the mirrors spend on capture in here, for ``rows`` rows."""
        before = [m.times().write_ns for m in self.stored]
        yield
        for calls, mirror, start in zip(self._captured[name], self.stored, before, strict=True):
            calls.append((rows, mirror.times().write_ns - start))

    def compare(self, count: int) -> None:
        """Read rows 0..count-1 of every mirror, compare them with the reference, and forget them."""
        n = self.reference.n_embd
        for start in range(0, count, _CHUNK):
            rows = self.reference.read(start=start, count=min(_CHUNK, count - start))
            for tap, profile in enumerate(self._profiles):
                profile.add(rows[:, tap * n : (tap + 1) * n])
            for index, mirror in enumerate(self.stored):
                before = mirror.times().read_ns
                got = mirror.read(start=start, count=len(rows))
                self._read[index].append((len(rows), mirror.times().read_ns - before))
                self._row[index].add(rows, got)
                for tap, meter in enumerate(self._taps[index]):
                    part = slice(tap * n, (tap + 1) * n)
                    meter.add(rows[:, part], got[:, part])
        self.rows += count
        for mirror in (self.reference, *self.stored):
            mirror.clear()

    def dtype_reports(self) -> tuple[DtypeReport, ...]:
        return tuple(self._dtype_report(index) for index in range(len(self.stored)))

    def _dtype_report(self, index: int) -> DtypeReport:
        mirror = self.stored[index]
        moved = self.reference.row_nbytes + mirror.row_nbytes
        return DtypeReport(
            dtype=mirror.dtype,
            row_bytes=mirror.row_nbytes,
            context_bytes=mirror.row_nbytes * self.info.n_ctx_train,
            snr=self._row[index].result(),
            tap_snr=tuple(meter.result() for meter in self._taps[index]),
            clamped=tuple(mirror.tap_stats(tap).overflow for tap in range(mirror.taps)),
            prefill=Speed.of(self._captured[PREFILL][index], moved),
            decode=Speed.of(self._captured[DECODE][index], moved),
            read=Speed.of(self._read[index], moved),
        )

    def tap_profiles(self, layers: Sequence[int | None]) -> tuple[TapProfile, ...]:
        stats = [self.reference.tap_stats(tap) for tap in range(len(layers))]
        return tuple(
            profile.result(layer, nan=s.nan, inf=s.inf)
            for profile, layer, s in zip(self._profiles, layers, stats, strict=True)
        )


def _draft_spec(path: str | Path | None, info: ModelInfo, rows: str, taps: Sequence[int] | None) -> DraftSpec | None:
    if path is None:
        if rows == FUSED:
            raise ArgumentError("fused rows are made by a draft's projection: name the draft (-md)")
        return None
    if taps is not None:
        raise ArgumentError("the draft says which blocks are tapped; leave the taps out")
    return DraftSpec.read(path, info)


@contextmanager
def _untimed(name: str, rows: int) -> Iterator[None]:
    yield  # fused rows are stored afterwards


@contextmanager
def _draft(llm: Llama, spec: DraftSpec, device: Device, n_threads: int | None) -> Iterator[Draft]:
    hook = Hook.of(llm)
    draft = Draft(
        spec,
        n_vocab=llm.n_vocab(),
        tok_embd=hook.tok_embd,
        output=hook.output,
        device_index=device.index,
        window=1,
        n_threads=n_threads or 0,
        rows=FUSED,
        kv="off",
    )
    try:
        yield draft
    finally:
        draft.close()


def _checked_taps(taps: Sequence[int] | None, info: ModelInfo) -> tuple[int, ...]:
    if taps is None:
        return default_taps(info.n_layer)
    bad = [t for t in taps if not 0 <= t < info.n_layer - 1]
    if bad or not taps or len(set(taps)) != len(taps):
        why = f"{bad[0]} is not one of them" if bad else "each once, and at least one"
        raise ArgumentError(
            f"taps {', '.join(map(str, taps)) or '(none)'}: {info.path.name} has blocks 0..{info.n_layer - 2} to tap"
            f" (the last, {info.n_layer - 1}, gives only rows that need logits); {why}"
        )
    return tuple(taps)


def _check_options(
    prompts: Sequence[Prompt],
    style: str,
    n_predict: int,
    n_ctx: int | None,
    n_batch: int,
    n_ubatch: int,
    n_threads: int | None,
) -> None:
    if not prompts:
        raise ArgumentError("no prompts")
    if style not in STYLES:
        raise ArgumentError(f"style {style!r}; use one of {', '.join(STYLES)}")
    if n_predict < 0:
        raise ArgumentError(f"n_predict = {n_predict}; 0 or more")
    if n_ctx is not None and n_ctx < 0:
        raise ArgumentError(f"n_ctx = {n_ctx}; a number of tokens, or 0 for the model's own")
    if n_batch < 1 or n_ubatch < 1:
        raise ArgumentError(f"n_batch = {n_batch}, n_ubatch = {n_ubatch}; at least 1")
    if n_threads is not None and n_threads < 1:
        raise ArgumentError(f"n_threads = {n_threads}; at least 1")


def _chosen_dtypes(
    dtypes: Sequence[str | FeatureDtype] | None, n_embd: int, device: Device
) -> tuple[tuple[FeatureDtype, ...], list[str]]:
    chosen, notes = usable_dtypes(n_embd, dtypes)
    support = {d: device.supports(d) for d in chosen}
    bad = [d for d in chosen if not (support[d].capture and support[d].read)]
    good = tuple(d for d in chosen if d not in bad)
    if bad and dtypes is not None:
        lacks = "capture" if not support[bad[0]].capture else "read"
        raise DtypeError(
            f"{device.name} cannot {lacks} {bad[0]} rows; it can hold {', '.join(map(str, good)) or 'none of these'}"
        )
    if bad:
        notes += (f"left out {', '.join(map(str, bad))}: {device.name} cannot both capture and read them",)
    return good, list(notes)


def _warm_up(mirror: FeatureMirror) -> None:
    # Touch every page of the ring and the code paths once, so that the first prompt is not charged for it.
    zeros = np.zeros((min(_CHUNK, mirror.cap), mirror.width), dtype=np.float32)
    for start in range(0, mirror.cap, _CHUNK):
        count = min(_CHUNK, mirror.cap - start)
        mirror.write_rows(start=start, rows=zeros[:count])
        mirror.read(start=start, count=count)
    mirror.clear()
    mirror.reset_stats()
