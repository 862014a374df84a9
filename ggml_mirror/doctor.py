"""What is installed, what it can do here, and what is wrong with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import GgmlMirrorError

if TYPE_CHECKING:
    from .device import Device, Support
    from .dtype import FeatureDtype

_PACKAGE = "ggml-mirror"
_NEEDED = ("llama-cpp-python", "gguf", "numpy")


@dataclass(frozen=True)
class DeviceDiagnosis:
    """A device: memory in bytes, support per dtype, and what F32 rows sent through it met (None: all well)."""

    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int
    dtypes: dict[FeatureDtype, Support]
    own: dict[FeatureDtype, bool]  # converted by this package's own code; else by ggml's operations
    self_test: str | None


@dataclass
class Diagnosis:
    """What :func:`diagnose` found; ``problems`` is empty when all is well."""

    versions: dict[str, str | None] = field(default_factory=dict)
    backends: list[str] = field(default_factory=list)
    devices: list[DeviceDiagnosis] = field(default_factory=list)
    default_dtype: str | None = None
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values; memory in bytes."""
        return {
            "ok": not self.problems,
            "versions": self.versions,
            "backends": self.backends,
            "default_dtype": self.default_dtype,
            "devices": [
                {
                    "name": d.name,
                    "description": d.description,
                    "type": d.type,
                    "memory_free": d.memory_free,
                    "memory_total": d.memory_total,
                    "self_test": "ok" if d.self_test is None else d.self_test,
                    "dtypes": {
                        t.value: {"capture": s.capture, "read": s.read, "own_kernels": d.own[t]}
                        for t, s in d.dtypes.items()
                    },
                }
                for d in self.devices
            ],
            "problems": self.problems,
        }


def diagnose() -> Diagnosis:
    """Look at everything that can be looked at; a broken part is reported, never raised."""
    found = Diagnosis()
    found.versions["python"] = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    found.versions[_PACKAGE] = package_version(_PACKAGE) or "run from a checkout, not installed"
    for package in _NEEDED:
        found.versions[package] = package_version(package)
        if found.versions[package] is None:
            found.problems.append(f"{package} is not installed in this environment: pip install {package}")
    try:
        native = importlib.import_module("ggml_mirror._native")
    except (ImportError, OSError) as error:  # VersionMismatchError, a library that is absent or does not load
        found.problems.append(f"the native library cannot be used: {error}")
        return found
    _native_versions(native, found)
    try:
        _default_dtype(found)
        _devices(found)
    except GgmlMirrorError as error:
        found.problems.append(str(error))
    return found


def package_version(package: str) -> str | None:
    """The version of an installed distribution; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_versions(native: Any, found: Diagnosis) -> None:
    ggml = native.ggml_versions()
    library = native.text(native.lib.gm_version())
    found.versions["native library"] = library
    package = package_version(_PACKAGE)
    if package not in (None, library):
        found.problems.append(f"the package is {package}, its native library {library}: reinstall ggml-mirror")
    found.versions["ggml at build"] = f"{ggml.built} ({ggml.built_commit})"
    found.versions["ggml loaded"] = f"{ggml.loaded} ({ggml.loaded_commit})"


def _default_dtype(found: Diagnosis) -> None:
    from .dtype import AUTO, FeatureDtype

    try:
        choice = FeatureDtype.resolve_choice(None)
        found.default_dtype = AUTO if choice is None else choice.value
    except GgmlMirrorError as error:
        found.problems.append(str(error))


def _devices(found: Diagnosis) -> None:
    from .device import devices
    from .dtype import FeatureDtype

    for device in devices():
        dtypes = {dtype: device.supports(dtype) for dtype in FeatureDtype}
        own = {dtype: device.converts(dtype) for dtype in FeatureDtype}
        test = _self_test(device)
        memory = (device.memory_free, device.memory_total)
        found.devices.append(
            DeviceDiagnosis(device.name, device.description, str(device.type), *memory, dtypes, own, test)
        )
        if device.backend not in found.backends:
            found.backends.append(device.backend)
        if test is not None:
            found.problems.append(f"{device.name}: {test}")
    if not found.devices:
        found.problems.append("ggml has no devices, not even a CPU: reinstall llama-cpp-python")


def _self_test(device: Device) -> str | None:
    """Rows in, rows out, across the end of the ring; F32 must come back bit for bit."""
    import numpy as np

    from .mirror import FeatureMirror

    rows = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    try:
        with FeatureMirror(taps=2, n_embd=32, cap=7, dtype="f32", device=device.name) as mirror:
            mirror.write_rows(start=4, rows=rows)
            got = mirror.read(start=4, count=5)
    except GgmlMirrorError as error:
        return str(error)
    return None if np.array_equal(rows, got) else "F32 rows did not come back as they were written"
