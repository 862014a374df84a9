"""The wheel of llama-cpp-python, compiled at most once per machine and kept in the cache.

    python scripts/setup/llama_cpp_wheel.py     # prints the path of the wheel

A cached wheel is found by version, build settings (CMAKE_ARGS, compilers and their flags) and CPU features.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from cache import cache_dir, locked, say, work_dir

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAARCHS")


def version() -> str:
    """The version that pyproject.toml builds against."""
    found = re.search(r'"llama-cpp-python==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    if not found:
        raise SystemExit('pyproject.toml: build-system.requires must hold "llama-cpp-python==VERSION"')
    return found[1]


def build_settings() -> dict[str, str]:
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def machine() -> str:
    """What a build for the native CPU depends on: ggml compiles with -march=native."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = " ".join(sorted(found[1].split())) if found else ""
    return f"{platform.system()} {platform.machine()} {'-'.join(platform.libc_ver())} {flags}"


def wheel_name() -> str:
    """Name of the wheel's directory in the cache: the version and a hash of all that the build depends on."""
    key = repr((version(), sorted(build_settings().items()), machine()))
    return f"llama-cpp-python-{version()}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def wheel(python: str = sys.executable) -> Path:
    """Path of the wheel, built with the pip of `python` if the cache has none."""
    wheels = cache_dir("wheels")
    home = wheels / wheel_name()
    with locked(wheels / f"{home.name}.lock"):
        if not home.exists():
            _build(python, home)
    return next(home.glob("*.whl"))


def _build(python: str, home: Path) -> None:
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", f"llama-cpp-python=={version()}"]
    # pip's own cache does not know the settings or the CPU that its wheel was built for. Rely on it only while it can
    # hold nothing but a default build of this machine.
    other_builds = any(path.is_dir() for path in home.parent.glob(f"llama-cpp-python-{version()}-*"))
    if build_settings() or other_builds:
        command += ["--no-cache-dir", "--no-binary", "llama-cpp-python"]
    say(f"building llama-cpp-python {version()}, once for this machine (about 5 minutes on 2 cores)")
    start = time.monotonic()
    with work_dir(home.parent, home.name) as work:
        subprocess.run([*command, "--wheel-dir", str(work / "wheel")], check=True, stdout=sys.stderr)
        if len(list((work / "wheel").glob("*.whl"))) != 1:
            raise SystemExit(f"pip left no wheel of llama-cpp-python {version()}")
        os.replace(work / "wheel", home)  # whole or absent, however this process ends
    say(f"built in {time.monotonic() - start:.0f} s, kept in {home}")


if __name__ == "__main__":
    print(wheel())
