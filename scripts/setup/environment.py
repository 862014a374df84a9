"""Bring a virtual environment up to date: pinned dependencies, llama-cpp-python, and this package (editable).

    python3 scripts/setup/environment.py .venv

Does only what changed since the last run, by content, and nothing in the usual case. Runs with any Python 3.10 or
newer and needs no package.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cache import locked, say
from llama_cpp_wheel import ROOT, wheel, wheel_name

# What the installed native library and the package metadata are made from. Python sources are used in place.
PACKAGE_INPUTS = ("pyproject.toml", "CMakeLists.txt", "scripts/setup/built_against.py", "native")


def set_up(venv: Path) -> None:
    with locked(venv.with_name(f"{venv.name}.lock")):
        _create(venv)
        stamps = Stamps(venv)
        known_build = "llama-cpp-python" in stamps.known
        python = str(venv / "bin" / "python")
        pip_install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

        def dependencies() -> None:
            say("installing the pinned dependencies")
            subprocess.run([*pip_install, "-r", str(ROOT / "requirements.txt")], check=True)

        def llama_cpp() -> None:
            # pip does not tell builds of one version apart. What the user installed before the first run stays.
            force = ["--force-reinstall"] if known_build else []
            path = wheel(python)
            say(f"installing {path.name}")
            subprocess.run([*pip_install, "--no-deps", *force, str(path)], check=True)

        def package() -> None:
            say("building the native library and installing the package (editable)")
            start = time.monotonic()
            subprocess.run([*pip_install, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)], check=True)
            say(f"built and installed in {time.monotonic() - start:.0f} s")

        stamps.run("environment", str(venv), lambda: None)
        stamps.run("dependencies", _digest("requirements.txt"), dependencies)
        stamps.run("llama-cpp-python", wheel_name(), llama_cpp)
        stamps.run("ggml-mirror", f"{ROOT} {wheel_name()} {_digest(*PACKAGE_INPUTS)}", package)


class Stamps:
    """Which steps were done in an environment, and from what; kept inside it."""

    def __init__(self, venv: Path) -> None:
        self.path = venv / "ggml-mirror-setup.json"
        self.known: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, step: str, inputs: str, action: Callable[[], None]) -> None:
        if self.known.get(step) == inputs:
            return
        self._note(step, "unfinished")
        action()
        self._note(step, inputs)

    def _note(self, step: str, state: str) -> None:
        self.known[step] = state
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.known, indent=1))
        partial.replace(self.path)


def _create(venv: Path) -> None:
    here = "{}.{}".format(*sys.version_info)
    config = venv / "pyvenv.cfg"
    if config.exists():
        found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", config.read_text(), re.MULTILINE)
        if found and found[1] != here:
            raise SystemExit(
                f"{venv} is an environment of Python {found[1]}, and this is Python {here}: "
                f"choose another place with VENV=DIR, or remove {venv}"
            )
        # pip comes last when an environment is made. Scripts hold absolute paths, so a copy of one is of no use.
        if (venv / "bin" / "python").exists() and (venv / "bin" / "pip").exists():
            if Stamps(venv).known.get("environment", str(venv)) == str(venv):
                return
        say(f"{venv} is incomplete or was moved: making it anew")
        shutil.rmtree(venv)
    elif venv.exists() and any(venv.iterdir()):
        raise SystemExit(f"{venv} exists and is no virtual environment: choose another place with VENV=DIR")
    say(f"creating {venv} (Python {here})")
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if made.returncode:
        output = made.stdout + made.stderr
        hint = "\nOn Debian and Ubuntu: apt-get install python3-venv" if "ensurepip" in output else ""
        raise SystemExit(f"{sys.executable} -m venv failed:\n{output.strip()}{hint}")


def _digest(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        set_up(Path(sys.argv[1]).absolute())
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"failed ({error.returncode}): {' '.join(map(str, error.cmd))}") from None
