"""What a GGUF file says about a target or a draft, in this project's terms, and whether a pair fits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType
from rich.console import Console
from rich.markup import escape

from .byte_size import format_bytes
from .draft import DraftSpec
from .dtype import FeatureDtype, row_bytes
from .errors import ArgumentError, DraftMismatchError, ShapeError
from .gguf_file import GgufFile, GgufTensor
from .model_info import ModelInfo, default_taps
from .report import _columns, _table


@dataclass(frozen=True)
class Weights:
    """A draft's tensors of one ggml type; ``n_bytes`` is None for a type that the installed gguf package does not know."""

    type: str
    n_tensors: int
    n_params: int
    n_bytes: int | None


@dataclass(frozen=True)
class Fit:
    """Whether a draft fits a target; ``reason`` names both numbers if not."""

    target: Path
    fits: bool
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """A target or a draft.

    Attributes:
        taps: 0-based blocks of the target whose outputs a row holds: a target's default ones, or a draft's. Empty where a draft
            does not name them and no target is given: they are then the target's default ones.
        n_taps: how many, also where they are not named.
        tap_width: values of one tap.
        row_bytes: per dtype; None where a tap does not divide into the dtype's blocks.
        spec, weights, fit: of drafts; ``fit`` only with a target.
    """

    info: ModelInfo
    family: str
    taps: tuple[int, ...]
    n_taps: int
    tap_width: int
    row_bytes: dict[FeatureDtype, int | None]
    spec: DraftSpec | None = None
    weights: tuple[Weights, ...] = ()
    fit: Fit | None = None

    @property
    def file_taps(self) -> tuple[int, ...] | None:
        """A draft's taps as its file numbers them: llama.cpp counts layer inputs, so block + 1. None: it does not name them."""
        if self.info.draft is None or self.info.draft.taps is None:
            return None
        shift = 1 if self.info.arch == "dflash" else 0
        return tuple(tap + shift for tap in self.info.draft.taps)

    @property
    def n_params(self) -> int:
        return sum(w.n_params for w in self.weights)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values; all sizes in bytes."""
        info = self.info
        return {
            "path": str(info.path),
            "arch": info.arch,
            "family": self.family,
            "name": info.name,
            "n_layer": info.n_layer,
            "n_embd": info.n_embd,
            "n_ctx_train": info.n_ctx_train,
            "n_vocab": info.n_vocab,
            "file_bytes": info.n_bytes,
            "row": {
                "taps": list(self.taps) or None,
                "n_taps": self.n_taps,
                "tap_width": self.tap_width,
                "width": self.n_taps * self.tap_width,
                "row_bytes": {dtype.value: size for dtype, size in self.row_bytes.items()},
            },
            "draft": None if self.spec is None else self._draft_json(self.spec),
            "fit": None
            if self.fit is None
            else {"target": str(self.fit.target), "fits": self.fit.fits, "reason": self.fit.reason},
        }

    def _draft_json(self, spec: DraftSpec) -> dict[str, Any]:
        return {
            "taps_in_file": None if self.file_taps is None else list(self.file_taps),
            "block_size": spec.block_size or None,
            "mask_token": None if spec.mask_token < 0 else spec.mask_token,
            "causal": spec.causal,
            "sliding_window": spec.n_swa or None,
            "sliding_layers": list(spec.swa_layers),
            "n_params": self.n_params,
            "weights": {
                w.type: {"tensors": w.n_tensors, "params": w.n_params, "bytes": w.n_bytes} for w in self.weights
            },
        }


def inspect(path: str | os.PathLike[str], *, target: str | os.PathLike[str] | None = None) -> Inspection:
    """Read the header of a target or a draft, and check a draft against its target if one is given.

    Raises:
        ModelFileError: a file that cannot be read.
        UnsupportedDraftError: a draft of another design, or with a feature that the draft graph lacks.
        ArgumentError: a target to be checked against a target.
    """
    info = ModelInfo.read(path)
    if info.draft is None:
        if target is not None:
            raise ArgumentError(
                f"{info.path}: not a DFlash draft (architecture {info.arch!r}); only drafts fit a target"
            )
        taps = default_taps(info.n_layer) if info.n_layer >= 2 else ()
        return Inspection(info, "target", taps, len(taps), info.n_embd, _row_bytes(len(taps), info.n_embd))

    file = GgufFile.read(path)
    spec, fit = DraftSpec.of_file(file, info, ()), None
    if target is not None:
        model = ModelInfo.read(target)
        try:
            spec = DraftSpec.read(path, model)
            fit = Fit(model.path, True, None)
        except DraftMismatchError as error:
            fit = Fit(model.path, False, str(error))
    return Inspection(
        info,
        f"{'llama.cpp' if info.arch == 'dflash' else 'lucebox'} draft",
        spec.taps,
        info.draft.n_taps,
        spec.n_embd_target,
        _row_bytes(info.draft.n_taps, spec.n_embd_target),
        spec,
        tuple(_by_type(file.tensors.values())),
        fit,
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """The facts, the row's bytes per dtype, and a draft's weights per type."""
    info, spec = found.info, found.spec
    table = _table(escape(info.name))
    table.add_column("entry")
    table.add_column("value", overflow="fold")

    def fact(name: str, value: object) -> None:
        table.add_row(name, escape(str(value)))

    fact("file", info.path)
    fact("architecture", f"{info.arch} ({found.family})")
    fact("layers", info.n_layer)
    fact("n_embd", info.n_embd)
    fact("context", f"{info.n_ctx_train:,} tokens")
    fact("vocabulary", "not given" if info.n_vocab is None else f"{info.n_vocab:,} tokens")
    fact("size", f"{info.n_bytes:,} bytes ({format_bytes(info.n_bytes)})")
    taps = ", ".join(map(str, found.taps))
    if spec is None:
        fact("default taps", taps or "none: a model of one block has no output to tap")
    else:
        fact("taps (block outputs)", taps or f"{found.n_taps}, not named: the target's default ones")
        if found.file_taps is not None:
            numbered = "layer inputs" if info.arch == "dflash" else "block outputs"
            fact("taps in the file", f"{', '.join(map(str, found.file_taps))} ({numbered})")
    fact("row", f"{found.n_taps} taps x {found.tap_width:,} = {found.n_taps * found.tap_width:,} values")
    if spec is not None:
        fact("block", f"{spec.block_size} tokens, the last committed one included" if spec.block_size else "not given")
        fact("mask token", spec.mask_token if spec.mask_token >= 0 else "not given")
        fact("attention in the block", "causal" if spec.causal else "bidirectional")
        layers = ", ".join(map(str, spec.swa_layers))
        fact("sliding window", f"{spec.n_swa:,} positions in layers {layers}" if layers else "none")
        fact("parameters", f"{found.n_params:,}")
    console.print(table)

    table = _table("A row of the mirror")
    _columns(table, "dtype", "bytes", "of f32")
    for dtype, size in found.row_bytes.items():
        cells = ("[dim]not possible[/]", "") if size is None else (f"{size:,}", _share(size, found))
        table.add_row(dtype.value, *cells)
    console.print(table)

    if found.weights:
        table = _table("Weights")
        _columns(table, "type", "tensors", "parameters", "bytes")
        for w in found.weights:
            n_bytes = "unknown" if w.n_bytes is None else f"{w.n_bytes:,}"
            table.add_row(w.type, f"{w.n_tensors:,}", f"{w.n_params:,}", n_bytes)
        console.print(table)
    if found.fit is not None:
        target = escape(str(found.fit.target))
        console.print(
            f"[green]fits[/] {target}" if found.fit.fits else f"[red]does not fit:[/] {escape(found.fit.reason or '')}"
        )


def _share(size: int, found: Inspection) -> str:
    f32 = 4 * found.n_taps * found.tap_width
    return f"{size / f32:.1%}" if f32 else ""


def _row_bytes(n_taps: int, tap_width: int) -> dict[FeatureDtype, int | None]:
    def size(dtype: FeatureDtype) -> int | None:
        try:
            return n_taps * row_bytes(dtype, tap_width)
        except ShapeError:
            return None

    return {dtype: size(dtype) for dtype in FeatureDtype}


def _by_type(tensors: Iterable[GgufTensor]) -> list[Weights]:
    """Weights by ggml type, the largest first."""
    groups: dict[int, list[GgufTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, []).append(tensor)
    known = {t.value: t.name.lower() for t in GGMLQuantizationType}
    weights = []
    for number, group in groups.items():
        sizes = [t.n_bytes for t in group]
        n_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        n_params = sum(math.prod(t.shape) for t in group)
        weights.append(Weights(known.get(number, f"type {number}"), len(group), n_params, n_bytes))
    return sorted(weights, key=lambda w: -w.n_params)
