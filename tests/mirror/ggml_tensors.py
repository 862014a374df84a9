"""Real ggml tensors, made with the ggml that llama_cpp has loaded and nothing of this package."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np

from .reference import Floats

_FOLDER = Path(llama_cpp.__file__).parent / "lib"
_SUFFIX = {"darwin": ".dylib"}.get(__import__("sys").platform, ".so")
_base = ctypes.CDLL(str(_FOLDER / f"libggml-base{_SUFFIX}"))
_ggml = ctypes.CDLL(str(_FOLDER / f"libggml{_SUFFIX}"))

F32, F16, Q8_0, I32 = 0, 1, 8, 26  # enum ggml_type


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def _declare(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> object:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


# struct ggml_context * ggml_init(struct ggml_init_params params);
_init = _declare(_base, "ggml_init", c_void_p, _InitParams)
# void ggml_free(struct ggml_context * ctx);
_free = _declare(_base, "ggml_free", None, c_void_p)
# struct ggml_tensor * ggml_new_tensor_4d(ctx, enum ggml_type type, int64_t ne0, ..., int64_t ne3);
_new_tensor = _declare(_base, "ggml_new_tensor_4d", c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64)
# struct ggml_tensor * ggml_view_2d(ctx, a, int64_t ne0, int64_t ne1, size_t nb1, size_t offset);
_view_2d = _declare(_base, "ggml_view_2d", c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t)
# struct ggml_tensor * ggml_view_3d(ctx, a, int64_t ne0, int64_t ne1, int64_t ne2, nb1, nb2, offset);
_view_3d = _declare(
    _base, "ggml_view_3d", c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t
)
# struct ggml_tensor * ggml_transpose(struct ggml_context * ctx, struct ggml_tensor * a);
_transpose = _declare(_base, "ggml_transpose", c_void_p, c_void_p, c_void_p)
# ggml_backend_dev_t ggml_backend_dev_by_name(const char * name);
_dev_by_name = _declare(_ggml, "ggml_backend_dev_by_name", c_void_p, c_char_p)
# ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device);
_dev_buffer_type = _declare(_base, "ggml_backend_dev_buffer_type", c_void_p, c_void_p)
# ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_buffer_type_t buft);
_alloc = _declare(_base, "ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
# void ggml_backend_buffer_free(ggml_backend_buffer_t buffer);
_buffer_free = _declare(_base, "ggml_backend_buffer_free", None, c_void_p)
# void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
_tensor_set = _declare(_base, "ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
# void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
_tensor_get = _declare(_base, "ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)


class Tensors:
    """A ggml context; tensors are addresses. ``allocate`` gives those made so far memory on a device."""

    def __init__(self, *, no_alloc: bool = True) -> None:
        self._context = _init(_InitParams(1 << 20, None, no_alloc))
        self._buffers: list[int] = []

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for buffer in self._buffers:
            _buffer_free(buffer)
        _free(self._context)

    def new(self, *ne: int, type: int = F32) -> int:
        return _new_tensor(self._context, type, *ne, *[1] * (4 - len(ne)))

    def allocate(self, device: str | int) -> None:
        """On a device, or in a buffer type by its address."""
        kind = _dev_buffer_type(_dev_by_name(device.upper().encode())) if isinstance(device, str) else device
        buffer = _alloc(self._context, kind)
        assert buffer, f"{device} gave no memory"
        self._buffers.append(buffer)

    def of(self, rows: Floats, device: str | int) -> int:
        """An allocated F32 tensor [width, n] that holds rows [n, width]."""
        tensor = self.new(*rows.shape[::-1])
        self.allocate(device)
        self.set(tensor, rows)
        return tensor

    def view_2d(self, of: int, ne0: int, ne1: int, nb1: int, offset: int = 0) -> int:
        return _view_2d(self._context, of, ne0, ne1, nb1, offset)

    def view_3d(self, of: int, ne0: int, ne1: int, ne2: int, nb1: int, nb2: int, offset: int = 0) -> int:
        return _view_3d(self._context, of, ne0, ne1, ne2, nb1, nb2, offset)

    def transpose(self, of: int) -> int:
        return _transpose(self._context, of)

    def set(self, tensor: int, rows: Floats) -> None:
        rows = np.ascontiguousarray(rows)
        _tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)

    def get(self, tensor: int, *shape: int) -> Floats:
        rows = np.empty(shape, np.float32)
        _tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
        return rows
