"""The ggml that llama_cpp has loaded, for scripts that call it themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cffi
import llama_cpp


def open_ggml(ffi: cffi.FFI) -> Any:
    """ggml's functions, as far as ``ffi`` declares them.

    Raises:
        SystemExit: llama_cpp came without its shared libraries.
    """
    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in "libggml.so", "libggml.dylib", "ggml.dll":
        if (folder / name).exists():
            return ffi.dlopen(str(folder / name))
    raise SystemExit(f"no ggml library in {folder}")
