"""Drafts whose target lies elsewhere: its embedding in host memory, its output matrix on another device. The logits are those of a
draft that has all on its own device.

There is one device here, so the other one is a twin: a copy of ggml's description of the CPU at another address. Everything runs on it,
and everything that compares devices takes it for another. The layouts are those of ggml-backend-impl.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from mirror.ggml_tensors import _base, _declare, _dev_by_name
from test_draft_graph import BLOCK, Bench, rows_of, step
from tiny_models import N_VOCAB, write_tiny_draft, write_tiny_model

from ggml_mirror import find_device
from ggml_mirror.draft import Draft, DraftSpec
from ggml_mirror.errors import UnsupportedError

_POINTER = ctypes.sizeof(ctypes.c_void_p)
_DEVICE_POINTERS = 15 + 2  # struct ggml_backend_device: functions, registry, context
_BUFFER_TYPE_POINTERS, _DEVICE_OF_TYPE, _IS_HOST = (
    6 + 2,
    6,
    5,
)  # struct ggml_backend_buffer_type: functions, device, context
_BUFFER_POINTERS, _TYPE_OF_BUFFER = 11 + 4, 11  # struct ggml_backend_buffer: functions, type, context, size, usage
_BUFFER_OF_TENSOR = 1
_overhead = _declare(_base, "ggml_tensor_overhead", ctypes.c_size_t)


def _copy(address: int, pointers: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * pointers).from_buffer_copy(ctypes.string_at(address, pointers * _POINTER))


class Twins:
    """Copies of tensors on a device that is not the CPU, though it does what the CPU does."""

    def __init__(self) -> None:
        self._kept: list[object] = []
        self.device = self._keep(_copy(_dev_by_name(b"CPU"), _DEVICE_POINTERS))

    def _keep(self, copy: ctypes.Array[ctypes.c_void_p]) -> int:
        self._kept.append(copy)
        return ctypes.addressof(copy)

    def of(self, tensor: int, *, is_host: bool = True) -> int:
        """The same tensor, in the same memory, but of the other device."""
        twin = _copy(tensor, _overhead() // _POINTER - 4)  # without ggml's own record in front of it
        buffer = _copy(twin[_BUFFER_OF_TENSOR], _BUFFER_POINTERS)
        kind = _copy(buffer[_TYPE_OF_BUFFER], _BUFFER_TYPE_POINTERS)
        kind[_DEVICE_OF_TYPE] = self.device
        if not is_host:
            kind[_IS_HOST] = None
        buffer[_TYPE_OF_BUFFER] = self._keep(kind)
        twin[_BUFFER_OF_TENSOR] = self._keep(buffer)
        return self._keep(twin)


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins()


#: Of the target's matrices. MXFP4 and others can be read, but not written by ggml: no dtype of a mirror.
@pytest.fixture(scope="module", params=["f32", "f16", "q8_0", "mxfp4"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    path = tmp_path_factory.mktemp("target") / "target.gguf"
    bench = Bench(write_tiny_model(path, matrix_type=request.param))
    with ExitStack() as bench.open:
        yield bench
    bench.llm.close()


def draft_of(bench: Bench, path: Path, tok_embd: int, output: int) -> Draft:
    draft = Draft(
        DraftSpec.read(path, bench.info),
        n_vocab=N_VOCAB,
        tok_embd=tok_embd,
        output=output,
        device_index=find_device("cpu").index,
        window=40,
        n_threads=1,
    )
    bench.open.callback(draft.close)
    return draft


@pytest.mark.parametrize("embedding_elsewhere", [False, True])
@pytest.mark.parametrize("output_elsewhere", [False, True])
def test_logits_do_not_depend_on_where_the_targets_matrices_lie(
    embedding_elsewhere: bool, output_elsewhere: bool, bench: Bench, twins: Twins, tmp_path: Path
) -> None:
    path, matrix = write_tiny_draft(tmp_path / "draft.gguf"), bench.hook.tok_embd  # also the output matrix: it is tied
    twin = twins.of(matrix)  # ggml may have repacked the one that the target multiplies with, and would not know its copy
    whole = draft_of(bench, path, matrix, matrix)
    split = draft_of(bench, path, twin if embedding_elsewhere else matrix, twin if output_elsewhere else matrix)
    mirror, rows = bench.mirror(), rows_of(700)
    for n_past in (*range(0, 700, 50), 600, 20):
        mirror.truncate(n_past)
        mirror.write_rows(start=max(0, n_past - 50), rows=rows[max(0, n_past - 50) : n_past])
        for n_tokens in (BLOCK - 1, 3):
            np.testing.assert_array_equal(
                step(split, mirror, n_past, n_tokens)[0], step(whole, mirror, n_past, n_tokens)[0]
            )
    assert split.bytes.weights == whole.bytes.weights and split.bytes.kv == whole.bytes.kv
    assert (split.bytes.compute > whole.bytes.compute) == output_elsewhere  # it has scratch there, too


def test_an_embedding_on_a_third_device_is_refused(bench: Bench, twins: Twins, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "draft.gguf")
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight lies on"):
        draft_of(bench, path, twins.of(bench.hook.tok_embd, is_host=False), bench.hook.output)
