"""A dtype-aware feature mirror for DFlash speculative decoding on ggml."""

import sys
from pathlib import Path
from typing import Any

__all__ = [
    "CachedLlama",
    "DFlashLlama",
    "Device",
    "FeatureDtype",
    "FeatureMirror",
    "GgmlMirrorError",
    "PrefixCache",
    "Snapshot",
    "__version__",
    "capture",
    "devices",
    "find_device",
    "fingerprint",
    "plan",
    "row_bytes",
]

try:
    from ._native import lib as _lib
    from ._native import text as _text
    from .cache.cached_llama import CachedLlama
    from .cache.prefix_cache import PrefixCache
    from .capture import capture
    from .device import Device, devices, find_device
    from .dflash import DFlashLlama
    from .dtype import FeatureDtype, row_bytes
    from .errors import GgmlMirrorError
    from .fingerprint import fingerprint
    from .mirror import FeatureMirror
    from .plan import plan
    from .snapshot import Snapshot

    __version__: str = _text(_lib.gm_version())
except ImportError as _error:
    # A broken install is an error at import, but for the command: it says so in a line, and `ggml-mirror doctor` says what is broken.
    if Path(sys.argv[0]).stem != "ggml-mirror":
        raise
    _reason = _error

    def __getattr__(name: str) -> Any:
        raise _reason if name in __all__ else AttributeError(f"module {__name__!r} has no attribute {name!r}")
