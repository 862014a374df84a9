"""The tiny pair and the demo pair of the drafting tests."""

from dflash.conftest import name, pair

__all__ = ["name", "pair"]
