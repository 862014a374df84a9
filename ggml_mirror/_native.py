"""The native library: found, checked against the loaded ggml, and bound through its own C header (cffi, ABI mode)."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import llama_cpp  # noqa: F401 - first, so that our library binds to the ggml that it has loaded (same SONAME)

from . import errors

#: Path of another build of the native library, for example one with sanitizers.
LIBRARY_VARIABLE = "GGML_MIRROR_LIB"

_LIBRARY_NAMES = ("libggml_mirror.so", "libggml_mirror.dylib", "ggml_mirror.dll")
_HEADER_NAME = "ggml_mirror.h"


def _folders() -> list[Path]:
    """Where an install puts the library and the header: beside this file, or in site-packages for an editable install."""
    paths = sysconfig.get_paths()
    return [Path(__file__).parent, Path(paths["platlib"]) / "ggml_mirror", Path(paths["purelib"]) / "ggml_mirror"]


def _find_library() -> Path:
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        if not Path(override).is_file():
            raise ImportError(f"{LIBRARY_VARIABLE}={override}: no such file")
        return Path(override)
    for folder in _folders():
        for name in _LIBRARY_NAMES:
            if (folder / name).is_file():
                return folder / name
    raise ImportError(
        f"the native library ({_LIBRARY_NAMES[0]}) is in none of {', '.join(map(str, _folders()))}; "
        "build it with `pip install --no-build-isolation .` in a checkout of ggml-mirror"
    )


def _find_header() -> Path:
    source_tree = Path(__file__).parent.parent / "native" / "include"
    for folder in [source_tree, *_folders()]:
        if (folder / _HEADER_NAME).is_file():
            return folder / _HEADER_NAME
    raise ImportError(f"{_HEADER_NAME} is missing; reinstall ggml-mirror")


def declarations(header: str) -> str:
    """The part of the C header that cffi understands: of preprocessor lines those that define an integer, no C++ guard."""
    header = re.sub(r"#ifdef __cplusplus\n.*?#endif", "", header, flags=re.S)
    header = re.sub(r"^\s*#(?!define \w+ \d+$).*$", "", header, flags=re.M)
    return header.replace("GM_API ", "")


ffi = cffi.FFI()
_header = _find_header().read_bytes()
ffi.cdef(declarations(_header.decode("utf-8")))
library_path = _find_library()
lib: Any = ffi.dlopen(str(library_path))


def text(value: Any) -> str:
    """A Python string from a C one."""
    raw: bytes = ffi.string(value)
    return raw.decode("utf-8", "replace")


@dataclass(frozen=True)
class GgmlVersions:
    """ggml version and commit, at build of the native library and as loaded into this process."""

    built: str
    built_commit: str
    loaded: str
    loaded_commit: str

    @property
    def match(self) -> bool:
        return (self.built, self.built_commit) == (self.loaded, self.loaded_commit)


def ggml_versions() -> GgmlVersions:
    return GgmlVersions(
        text(lib.gm_ggml_version_built()),
        text(lib.gm_ggml_commit_built()),
        text(lib.gm_ggml_version_loaded()),
        text(lib.gm_ggml_commit_loaded()),
    )


def require_match(versions: GgmlVersions) -> None:
    """Refuse to run on another ggml than the one built against: its structs and op signatures may differ.

    Raises:
        VersionMismatchError: names both versions and the command that mends it.
    """
    if not versions.match:
        raise errors.VersionMismatchError(
            f"ggml-mirror was built against ggml {versions.built} ({versions.built_commit}), but llama_cpp has loaded ggml "
            f"{versions.loaded} ({versions.loaded_commit}); rebuild it for the installed llama-cpp-python with "
            "`pip install --no-build-isolation --force-reinstall --no-deps ggml-mirror` (or `.` in a checkout)"
        )


def require_own_header(built: str | None, header: bytes) -> None:
    """Refuse a library of another checkout or release: its structs and functions may differ from those that Python knows.

    Args:
        built: SHA-256 of the header that the library was built with; "" if its build did not tell, None if it is older than that.

    Raises:
        VersionMismatchError: says how to rebuild it.
    """
    if built not in ("", hashlib.sha256(header).hexdigest()):
        raise errors.VersionMismatchError(
            f"{library_path} was built from another version of ggml-mirror than its Python files; rebuild it with `make env` in a "
            "checkout, or `pip install --no-build-isolation --force-reinstall --no-deps .`"
        )


require_own_header(text(lib.gm_header_built()) if hasattr(lib, "gm_header_built") else None, _header)
require_match(ggml_versions())

_EXCEPTIONS: dict[int, type[errors.GgmlMirrorError]] = {
    lib.GM_ERR_ARGUMENT: errors.ArgumentError,
    lib.GM_ERR_DTYPE: errors.DtypeError,
    lib.GM_ERR_WIDTH: errors.ShapeError,
    lib.GM_ERR_DEVICE: errors.DeviceError,
    lib.GM_ERR_UNSUPPORTED: errors.UnsupportedError,
    lib.GM_ERR_VIEW: errors.ViewError,
    lib.GM_ERR_CAPTURE: errors.CaptureError,
    lib.GM_ERR_BACKEND: errors.BackendError,
}


def check(status: int) -> None:
    """Raise the typed error behind a gm_status that is not GM_OK."""
    if status == lib.GM_OK:
        return
    info = lib.gm_last_error()
    message = text(info.message)
    if status == lib.GM_ERR_STALE:
        raise errors.StaleRowError(message, position=info.position)
    if status == lib.GM_ERR_MEMORY:
        raise errors.MirrorMemoryError(message, bytes_needed=info.bytes_needed, bytes_free=info.bytes_free)
    raise _EXCEPTIONS.get(status, errors.GgmlMirrorError)(message)
