"""The places a mirror can work in: a device, and which of its code paths converts rows there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from ggml_mirror import Device, FeatureMirror, devices, find_device
from ggml_mirror.dtype import FeatureDtype


@dataclass(frozen=True)
class Place:
    """``ggml_ops``: rows go through stock ggml graph ops, not this library's own loops or kernels."""

    device: str
    ggml_ops: bool
    is_host: bool

    @property
    def name(self) -> str:
        return f"{self.device.lower()}-{'ggml' if self.ggml_ops else 'loops' if self.is_host else 'kernels'}"

    def own_code(self, dtype: FeatureDtype) -> bool:
        """Rows are converted by this library: each value is looked at, zeros keep their sign, abs_max is measured."""
        return not self.ggml_ops and find_device(self.device).converts(dtype)

    def approximate(self, dtype: FeatureDtype) -> bool:
        """The kernels of a GPU backend of ggml need not divide exactly."""
        return not self.is_host and not self.own_code(dtype)

    def mirror(self, **arguments: Any) -> FeatureMirror:
        return FeatureMirror(device=self.device, ggml_ops=self.ggml_ops, **{"n_threads": 1, **arguments})

    def supports(self, dtype: FeatureDtype, taps: int = 4, n_embd: int = 64) -> bool:
        """Rows of a multiple of 256 values, unless told otherwise: CUDA reads iq4_nl only so."""
        support = find_device(self.device).supports(dtype, taps=taps, n_embd=n_embd)
        return support.capture and support.read


CPU_LOOPS = Place("cpu", ggml_ops=False, is_host=True)
CPU_GGML = Place("cpu", ggml_ops=True, is_host=True)


def _gpu_paths(device: Device) -> list[bool]:
    """ggml's operations; before them kernels, if this library was built with some for the device."""
    return [False, True] if device.converts("f32") else [True]


def place_params() -> list[Any]:
    """Both CPU paths, and those of each GPU under its marker; on a machine without one there are no GPU cases."""
    gpus = [Place(d.name, ggml_ops, is_host=False) for d in devices() if not d.is_host for ggml_ops in _gpu_paths(d)]
    return [
        *(pytest.param(p, id=p.name) for p in (CPU_LOOPS, CPU_GGML)),
        *(pytest.param(p, id=p.name, marks=pytest.mark.gpu) for p in gpus),
    ]
