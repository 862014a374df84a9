"""Typed errors. Each names the numbers and says what to do next; all derive from :class:`GgmlMirrorError`."""

from __future__ import annotations


class GgmlMirrorError(Exception):
    """Base class of every error that this package raises on purpose."""


class ArgumentError(GgmlMirrorError, ValueError):
    """A number, name or combination of arguments is out of range."""


class DtypeError(GgmlMirrorError, ValueError):
    """An unknown feature dtype, or one that the device cannot store; the message lists those that work."""


class ShapeError(GgmlMirrorError, ValueError):
    """An array, tensor or width of the wrong shape, layout or element type."""


class DeviceError(GgmlMirrorError):
    """No such ggml device, or it does not start."""


class UnsupportedError(GgmlMirrorError):
    """The device's ggml backend lacks an operation that the mirror needs."""


class MirrorMemoryError(GgmlMirrorError, MemoryError):
    """The mirror, or the draft that reads it, does not fit.

    Attributes:
        bytes_needed: bytes that the request would allocate.
        bytes_free: bytes that the device had free.
        max_cap: largest ``cap`` that fits at the requested dtype (0: none).
        fitting_dtypes: dtypes in which the requested ``cap`` fits, most precise first.
        max_window: of a draft, the largest window that fits (0: none).
        next_rung: where a draft is known, (feature_rows, feature_dtype) of the most precise smaller storage that fits, or None.
    """

    next_rung: tuple[str, str] | None = None

    def __init__(
        self,
        message: str,
        *,
        bytes_needed: int = 0,
        bytes_free: int = 0,
        max_cap: int = 0,
        fitting_dtypes: tuple[str, ...] = (),
        max_window: int = 0,
    ) -> None:
        super().__init__(message)
        self.bytes_needed = bytes_needed
        self.bytes_free = bytes_free
        self.max_cap = max_cap
        self.fitting_dtypes = fitting_dtypes
        self.max_window = max_window


class BudgetError(MirrorMemoryError):
    """Target, draft and mirror together do not fit; found before anything was allocated.

    Attributes:
        device: the one that is too small; the bytes are its.
        max_window: largest draft window that fits at the dtype that was asked for (0: none).
    """

    def __init__(
        self,
        message: str,
        *,
        device: str,
        bytes_needed: int,
        bytes_free: int,
        max_window: int = 0,
        fitting_dtypes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, bytes_needed=bytes_needed, bytes_free=bytes_free, fitting_dtypes=fitting_dtypes)
        self.device = device
        self.max_window = max_window


class StaleRowError(GgmlMirrorError, LookupError):
    """A row that was asked for is missing, partial or overwritten.

    Attributes:
        position: the first bad position.
    """

    def __init__(self, message: str, *, position: int = -1) -> None:
        super().__init__(message)
        self.position = position


class ViewError(GgmlMirrorError):
    """The rows cannot be used in place (not F32, wrapped, or not in host memory); use ``read``."""


class ClosedError(GgmlMirrorError):
    """The object was used after ``close``."""


class CaptureError(GgmlMirrorError, RuntimeError):
    """The model cannot give the tapped rows, or an evaluation did not."""


class BackendError(GgmlMirrorError, RuntimeError):
    """A ggml backend failed while computing; rows being written are forgotten."""


class SnapshotError(GgmlMirrorError):
    """A snapshot file is truncated, corrupt, foreign or of another format version."""


class SnapshotMismatchError(SnapshotError):
    """A sound snapshot that belongs to another mirror (dtype, taps, widths, cap, target or draft)."""


class CacheFileError(GgmlMirrorError):
    """A file of a prefix cache that cannot be used.

    Attributes:
        reason: "corrupt", "version", "identity", "unsafe" or "unreadable"; the name under which it is counted.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ModelFileError(GgmlMirrorError):
    """A GGUF file is missing, truncated, foreign, or lacks what is needed."""


class UnsupportedDraftError(GgmlMirrorError):
    """A draft of another design (DFlash2, DSpark) or with a feature that the draft graph lacks; names what was found."""


class DraftMismatchError(GgmlMirrorError, ValueError):
    """A sound draft that was made for another target; names both numbers."""


class VersionMismatchError(GgmlMirrorError, ImportError):
    """The native library was built against another ggml than the one that is loaded."""
