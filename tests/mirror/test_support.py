"""Which dtypes a device can hold: on the CPU all; elsewhere what its ops allow, and the rest is refused by name."""

from __future__ import annotations

import pytest

from ggml_mirror import FeatureDtype, devices, find_device
from ggml_mirror.errors import DeviceError, UnsupportedError

from .places import Place
from .process import assert_survives


@pytest.mark.parametrize(("taps", "n_embd"), [(1, 256), (1, 32), (5, 576), (5, 5120)])
def test_device_holds_exactly_what_it_says(place: Place, taps: int, n_embd: int) -> None:
    held = []
    for dtype in FeatureDtype:
        try:
            place.mirror(taps=taps, n_embd=n_embd, cap=4, dtype=dtype).close()
            held.append(dtype)
        except UnsupportedError as error:
            for part in (dtype, find_device(place.device).name, taps, n_embd):
                assert str(part) in str(error)
    assert held == [dtype for dtype in FeatureDtype if place.supports(dtype, taps, n_embd)]
    assert {"f32", "f16", "bf16", "q8_0"} <= set(held)
    assert not place.is_host or len(held) == len(FeatureDtype)


def test_support_of_any_width_is_support_of_each(place: Place, dtype: FeatureDtype) -> None:
    any_width = find_device(place.device).supports(dtype)
    if any_width.capture and any_width.read:
        assert all(place.supports(dtype, taps, n_embd) for taps, n_embd in ((1, 32), (1, 288), (5, 576), (64, 5120)))


def test_devices_are_found_by_name_in_any_case() -> None:
    assert {d.index for d in devices()} == set(range(len(devices())))
    for d in devices():
        for name in (d.name, d.name.lower(), d.name.upper(), f" {d.name} "):
            assert find_device(name).index == d.index


def test_auto_is_the_first_gpu_else_the_cpu() -> None:
    gpus = [d.name for d in devices() if d.type == "GPU"]
    assert find_device("auto").name == (gpus[0] if gpus else "CPU")


def test_support_of_an_unknown_device_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"no device named 'TPU7'.*CPU"):
        find_device("TPU7")


def test_memory_of_devices_is_plausible() -> None:
    for d in devices():
        assert 0 < d.memory_free <= d.memory_total or d.memory_total == 0


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 288, 2880])
def test_width_that_a_device_cannot_hold_is_refused_or_works(width: int) -> None:
    """CUDA reads iq4_nl only in rows of a multiple of 256 values, and says so if it is asked."""
    assert_survives(f"""
try:
    m = FeatureMirror(taps=1, n_embd={width}, cap=4, dtype="iq4_nl", device="auto")
except GgmlMirrorError as error:
    assert "iq4_nl" in str(error) and "{width}" in str(error)
else:
    m.write_rows(start=0, rows=np.ones((2, {width}), np.float32))
    m.read(start=0, count=2)
""")
