"""The ggml devices of this process, as llama_cpp has loaded them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ._native import check, ffi, lib, text
from .dtype import FeatureDtype
from .errors import DeviceError

#: enum ggml_backend_dev_type, in order.
DEVICE_TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")


@dataclass(frozen=True)
class Support:
    """What a device can do with a dtype: ``capture`` rows into a ring of it, ``read`` them back to F32."""

    capture: bool
    read: bool


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory that this process may still take, and all in all; ``limit`` says what sets ``free``."""

    free: int
    total: int
    limit: str


@dataclass(frozen=True)
class Device:
    """A ggml device. Memory is in bytes; for host devices ``memory_free`` is what this process may still take."""

    index: int
    name: str
    description: str
    backend: str
    type: str
    is_host: bool
    memory_free: int
    memory_total: int

    def supports(self, dtype: str | FeatureDtype, *, taps: int = 1, n_embd: int = 0) -> Support:
        """Support for rows of ``taps`` x ``n_embd``; without ``n_embd``, for rows of any width.

        (Some kernels want more than whole blocks: CUDA reads iq4_nl in rows of a multiple of 256 values.)
        """
        capture, read = ffi.new("bool *"), ffi.new("bool *")
        number = FeatureDtype.parse(dtype).ggml_type
        check(lib.gm_device_supports(self.index, number, n_embd, taps * n_embd, capture, read))
        return Support(bool(capture[0]), bool(read[0]))

    def converts(self, dtype: str | FeatureDtype) -> bool:
        """Whether rows of the dtype are converted by this library's own code: loops in host memory, CUDA or HIP kernels.
        Else ggml's operations do it."""
        converts = ffi.new("bool *")
        check(lib.gm_device_converts(self.index, FeatureDtype.parse(dtype).ggml_type, converts))
        return bool(converts[0])


def devices() -> list[Device]:
    """All devices, with their memory as it is now."""
    return [_device(i) for i in range(lib.gm_device_count())]


def host_memory(root: str | None = None) -> HostMemory:
    """The least of what the machine has available, what limits of control groups leave, and what ``ulimit -v`` leaves.

    Args:
        root: prefix of /proc and /sys; None for the real ones.
    """
    memory = ffi.new("gm_host_memory *")
    check(lib.gm_host_memory_get(ffi.NULL if root is None else os.fsencode(root), memory))
    return HostMemory(memory.free, memory.total, text(memory.limit))


def find_device(name: str) -> Device:
    """The device of that ggml name (any case), or "auto": the first GPU, else the CPU.

    Raises:
        DeviceError: no such device; the message lists the names.
    """
    if not isinstance(name, str):
        raise DeviceError(f"a device is named by a string such as 'cpu', 'auto' or 'CUDA0', not by {name!r}")
    index = ffi.new("int32_t *")
    # What is no C text (a NUL, a lone surrogate) names no device either; it goes on as what it is printed as.
    printable = name.strip() if name.isprintable() else ascii(name)
    check(lib.gm_device_find(printable.encode(), index))
    return _device(index[0])


def _device(index: int) -> Device:
    info = ffi.new("gm_device_info *")
    check(lib.gm_device_get(index, info))
    kind = DEVICE_TYPES[info.type] if 0 <= info.type < len(DEVICE_TYPES) else str(info.type)
    return Device(
        index=index,
        name=text(info.name),
        description=text(info.description),
        backend=text(info.backend),
        type=kind,
        is_host=bool(info.is_host),
        memory_free=info.memory_free,
        memory_total=info.memory_total,
    )
