"""Errors of training: each says what was wrong with the input and what to do."""

from __future__ import annotations


class TrainingError(Exception):
    """Base class of what this package raises on purpose."""


class InputError(TrainingError, ValueError):
    """An argument or a file of this package is not as it must be."""


class UnsupportedTargetError(TrainingError):
    """The target has something that the torch model does not compute."""
