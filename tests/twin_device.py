"""Drafts whose target lies on another device. Run by test_draft_split.py in a process of its own: it registers a device.

Where there is one device, the other one is a twin: a copy of ggml's description of the CPU, under another name. Everything runs on it, and
everything that compares devices takes it for another. The layouts are those of ggml-backend-impl.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from mirror.ggml_tensors import _base, _declare, _dev_by_name
from test_draft_graph import BLOCK, N_EMBD, TAPS, Bench, rows_of, step
from tiny_models import N_VOCAB, write_tiny_draft, write_tiny_model

from ggml_mirror import FeatureMirror, find_device
from ggml_mirror._native import check, ffi, lib
from ggml_mirror.draft import Draft, DraftSpec, draft_bytes
from ggml_mirror.errors import UnsupportedError

_POINTER = ctypes.sizeof(ctypes.c_void_p)
_DEVICE_POINTERS = 15 + 2  # struct ggml_backend_device: functions (the first is get_name), registry, context
_BUFFER_TYPE_POINTERS, _IS_HOST, _DEVICE_OF_TYPE = (
    6 + 2,
    5,
    6,
)  # struct ggml_backend_buffer_type: functions, device, context
_BUFFER_POINTERS, _TYPE_OF_BUFFER = 11 + 4, 11  # struct ggml_backend_buffer: functions, type, context, size, usage
_BUFFER_OF_TENSOR = 1  # struct ggml_tensor: type, buffer, ...

_overhead = _declare(_base, "ggml_tensor_overhead", ctypes.c_size_t)
# By its SONAME: the copy that this package is bound to, and not one of the same file under another name.
_register = _declare(ctypes.CDLL("libggml.so.0"), "ggml_backend_device_register", None, ctypes.c_void_p)

_kept: list[object] = []


def _copy(address: int, pointers: int) -> ctypes.Array[ctypes.c_void_p]:
    copy = (ctypes.c_void_p * pointers).from_buffer_copy(ctypes.string_at(address, pointers * _POINTER))
    _kept.append(copy)
    return copy


def _register_twin() -> int:
    device = _copy(_dev_by_name(b"CPU"), _DEVICE_POINTERS)
    name = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: ctypes.addressof(text))
    text = ctypes.create_string_buffer(b"TWIN")
    _kept.extend([name, text])
    device[0] = ctypes.cast(name, ctypes.c_void_p)
    _register(ctypes.addressof(device))
    return ctypes.addressof(device)


TWIN = _register_twin()


def twin_of(tensor: int, *, is_host: bool) -> int:
    """The same tensor in the same memory, but in a buffer of the other device."""
    twin = _copy(tensor, _overhead() // _POINTER - 4)  # without ggml's own record in front of it
    buffer = _copy(twin[_BUFFER_OF_TENSOR], _BUFFER_POINTERS)
    kind = _copy(buffer[_TYPE_OF_BUFFER], _BUFFER_TYPE_POINTERS)
    kind[_DEVICE_OF_TYPE] = TWIN
    if not is_host:
        kind[_IS_HOST] = None
    buffer[_TYPE_OF_BUFFER] = ctypes.addressof(kind)
    twin[_BUFFER_OF_TENSOR] = ctypes.addressof(buffer)
    return ctypes.addressof(twin)


#: Of the target's matrices. MXFP4 and others can be read, but not written by ggml: no dtype of a mirror.
@pytest.fixture(params=["f32", "f16", "q8_0", "mxfp4"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(write_tiny_model(tmp_path / "target.gguf", matrix_type=request.param))
    with ExitStack() as bench.open:
        yield bench
    bench.llm.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_draft(tmp_path / "draft.gguf")


def draft_on(device: str, bench: Bench, path: Path, tok_embd: int, output: int, rows: str = "raw") -> Draft:
    index = find_device(device).index
    draft = Draft(
        DraftSpec.read(path, bench.info),
        n_vocab=N_VOCAB,
        tok_embd=tok_embd,
        output=output,
        device_index=index,
        window=40,
        n_threads=1,
        rows=rows,
    )
    bench.open.callback(draft.close)
    return draft


@pytest.mark.parametrize("where", ["all", "embedding", "output", "none"])
def test_logits_do_not_depend_on_where_the_targets_matrices_lie(where: str, bench: Bench, path: Path) -> None:
    """The draft on the other device, and of the target what ``where`` says."""
    here = (
        bench.hook.tok_embd
    )  # also the output matrix, which is tied. ggml may have repacked the one that the target uses
    there = twin_of(here, is_host=False)
    split = draft_on(
        "twin",
        bench,
        path,
        there if where in ("all", "embedding") else here,
        there if where in ("all", "output") else here,
    )
    whole = draft_on("cpu", bench, path, here, here)
    mirrors = [
        bench.open.enter_context(FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=512, device=name, n_threads=1))
        for name in ("twin", "cpu")
    ]
    rows = rows_of(700)
    for n_past in (*range(0, 700, 50), 600, 20):
        start = max(0, n_past - 50)
        for mirror in mirrors:
            mirror.truncate(start)
            mirror.write_rows(start=start, rows=rows[start:n_past])
        for n_tokens in (BLOCK - 1, 3):
            logits = [
                step(draft, mirror, n_past, n_tokens)[0] for draft, mirror in zip((split, whole), mirrors, strict=True)
            ]
            np.testing.assert_array_equal(*logits)
    assert (split.bytes.weights, split.bytes.kv) == (whole.bytes.weights, whole.bytes.kv)
    assert (split.bytes.compute > whole.bytes.compute) == (where in ("embedding", "none"))  # scratch on both devices


def test_a_matrix_on_a_third_device_is_multiplied_there_but_no_embedding_is_read_there(
    bench: Bench, path: Path
) -> None:
    there = twin_of(bench.hook.tok_embd, is_host=False)
    draft_on("cpu", bench, path, bench.hook.tok_embd, there)
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight lies on TWIN"):
        draft_on("cpu", bench, path, there, bench.hook.tok_embd)


def test_host_memory_of_a_device_is_the_cpus(bench: Bench) -> None:
    """A GPU's backend gives pinned memory, in which a target that is not mapped keeps what is not on the GPU."""
    pinned, index = twin_of(bench.hook.tok_embd, is_host=True), ffi.new("int32_t *")
    check(lib.gm_tensor_device(ffi.cast("struct ggml_tensor *", pinned), index))
    assert index[0] == find_device("cpu").index != find_device("twin").index


def test_bytes_are_those_of_the_draft_on_either_device(bench: Bench, path: Path) -> None:
    spec = DraftSpec.read(path, bench.info)
    for name in ("cpu", "twin"):
        there = twin_of(bench.hook.tok_embd, is_host=False) if name == "twin" else bench.hook.tok_embd
        held = draft_on(name, bench, path, there, there).bytes
        assert held == draft_bytes(spec, n_vocab=N_VOCAB, device_index=find_device(name).index, window=40)


def test_raw_rows_that_lie_on_another_device_are_read_and_others_fused_in_place(bench: Bench, path: Path) -> None:
    draft = draft_on("twin", bench, path, bench.hook.tok_embd, bench.hook.tok_embd, rows="fused")
    rows, said, seen = rows_of(150), draft.bytes, {}
    for name in ("twin", "cpu"):
        raw = bench.open.enter_context(FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=130, device=name, n_threads=1))
        fused = bench.open.enter_context(FeatureMirror(taps=1, n_embd=N_EMBD, cap=130, device="twin", rows="fused"))
        raw.write_rows(start=20, rows=rows[20:])
        draft.reset_times()
        draft.fuse(raw, fused, start=20, count=130)
        assert (draft.times().read_ns == 0) == (name == "twin")
        seen[name] = fused.read(start=20, count=130)
    np.testing.assert_array_equal(seen["twin"], seen["cpu"])
    assert draft.bytes == said
