"""A dtype-aware feature mirror for DFlash speculative decoding on ggml."""

from ._native import lib as _lib
from ._native import text as _text
from .capture import capture
from .device import Device, devices, find_device
from .dtype import FeatureDtype, row_bytes
from .errors import GgmlMirrorError
from .fingerprint import fingerprint
from .mirror import FeatureMirror
from .plan import plan
from .snapshot import Snapshot

__version__: str = _text(_lib.gm_version())

__all__ = [
    "Device",
    "FeatureDtype",
    "FeatureMirror",
    "GgmlMirrorError",
    "Snapshot",
    "__version__",
    "capture",
    "devices",
    "find_device",
    "fingerprint",
    "plan",
    "row_bytes",
]
