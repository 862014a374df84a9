"""Build metadata: require at run time the llama-cpp-python that the native library was built against.

scikit-build-core calls this through ``[[tool.dynamic-metadata]]`` in pyproject.toml.
"""

from collections.abc import Mapping
from importlib import metadata
from typing import Any


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise SystemExit(
            "ggml-mirror builds against the ggml inside llama-cpp-python, which is not installed here. "
            "Install it first (pip install llama-cpp-python), or leave out --no-build-isolation."
        ) from None
    # A local label such as +cu124 names a build of the same sources; the library compares ggml's commit itself.
    return {"dependencies": [f"llama-cpp-python=={version.partition('+')[0]}"]}


def dynamic_wheel(settings: Mapping[str, Any]) -> dict[str, bool]:
    return {"dependencies": True}  # a source archive can be built against another version
