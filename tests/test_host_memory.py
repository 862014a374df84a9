"""Free host memory: the least of the machine's, each control group's and ulimit's, and which of them it is."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ggml_mirror.device import find_device, host_memory

MIB = 2**20
GIB = 2**30


def machine(root: Path, *, total: int, available: int, groups: str = "0::/\n") -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {total // 1024} kB\nMemFree:  1 kB\nMemAvailable:   {available // 1024} kB\n"
    )
    (root / "proc/self/cgroup").write_text(groups)


def group(root: Path, folder: str, **files: object) -> None:
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("_", ".", 1)).write_text(f"{text}\n")


def least(root: Path) -> tuple[int, int, str]:
    memory = host_memory(str(root))
    return memory.free, memory.total, memory.limit


def test_the_machine(tmp_path: Path) -> None:
    machine(tmp_path, total=16 * GIB, available=5 * GIB)
    assert least(tmp_path) == (5 * GIB, 16 * GIB, "available memory of the machine")


def test_a_container_sees_its_group_at_the_top(tmp_path: Path) -> None:
    """The path in /proc is the host's and is not there; page cache is given up on demand."""
    machine(tmp_path, total=64 * GIB, available=50 * GIB, groups="0::/docker/abc\n")
    stat = f"anon 5\nfile 7\ninactive_file {300 * MIB}\nactive_file {200 * MIB}\n"
    group(tmp_path, "", memory_max=4 * GIB, memory_current=3 * GIB, memory_stat=stat, memory_high="max")
    assert least(tmp_path) == (GIB + 500 * MIB, 4 * GIB, "limit of 4096 MiB of control group /")


def test_an_outer_group_that_is_tighter_counts(tmp_path: Path) -> None:
    machine(tmp_path, total=64 * GIB, available=50 * GIB, groups="0::/user.slice/app.scope\n")
    group(tmp_path, "user.slice", memory_max="max", memory_high=3 * GIB, memory_current=GIB)
    group(tmp_path, "user.slice/app.scope", memory_max=8 * GIB, memory_current=GIB // 2)
    assert least(tmp_path) == (2 * GIB, 3 * GIB, "limit of 3072 MiB of control group /user.slice")


def test_groups_of_version_1(tmp_path: Path) -> None:
    groups = "9:cpu:/other\n4:hugetlb,memory:/a/b\n0::/\n"
    machine(tmp_path, total=64 * GIB, available=50 * GIB, groups=groups)
    none = 9223372036854771712  # how version 1 writes "no limit"
    group(tmp_path, "memory", memory_limit_in_bytes=none, memory_usage_in_bytes=40 * GIB)
    group(tmp_path, "memory/a", memory_limit_in_bytes=none, memory_usage_in_bytes=30 * GIB)
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
    group(tmp_path, "memory/a/b", memory_limit_in_bytes=6 * GIB, memory_usage_in_bytes=5 * GIB, memory_stat=stat)
    assert least(tmp_path) == (3 * GIB, 6 * GIB, "limit of 6144 MiB of control group /a/b")


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    machine(tmp_path, total=64 * GIB, available=50 * GIB)
    group(tmp_path, "", memory_max=GIB, memory_current=2 * GIB)
    assert least(tmp_path) == (0, GIB, "limit of 1024 MiB of control group /")


def test_a_limit_that_does_not_bind(tmp_path: Path) -> None:
    machine(tmp_path, total=8 * GIB, available=2 * GIB)
    group(tmp_path, "", memory_max=100 * GIB, memory_current=GIB)
    assert least(tmp_path) == (2 * GIB, 8 * GIB, "available memory of the machine")


@pytest.mark.parametrize("text", ["", "nonsense\n", "4:memory\n", ":::\n", "0::relative"])
def test_files_of_another_form_count_as_absent(text: str, tmp_path: Path) -> None:
    machine(tmp_path, total=8 * GIB, available=2 * GIB, groups=text)
    group(tmp_path, "", memory_max="", memory_current="x", memory_stat="\0\1")
    assert least(tmp_path) == (2 * GIB, 8 * GIB, "available memory of the machine")


def test_nothing_to_read(tmp_path: Path) -> None:
    free, total, limit = least(tmp_path)
    assert free == total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limit == "physical memory"


def test_the_real_machine() -> None:
    memory, cpu = host_memory(), find_device("cpu")
    assert 0 < memory.free <= memory.total and memory.limit
    assert cpu.memory_free == pytest.approx(memory.free, rel=0.2) and cpu.memory_total == memory.total


def test_ulimit() -> None:
    code = """
import resource
from ggml_mirror.device import find_device, host_memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), -1))
memory = host_memory()
assert "ulimit -v of" in memory.limit, memory
assert abs(memory.free - (300 << 20)) < 64 << 20, memory
assert find_device("cpu").memory_free <= memory.free + (8 << 20)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
