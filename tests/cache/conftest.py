"""The tiny pair and the demo pair of the drafting tests."""

from dflash.conftest import demo_draft, name, pair

__all__ = ["demo_draft", "name", "pair"]
