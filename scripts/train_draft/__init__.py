"""Trains a DFlash draft for a small GGUF target: see docs/TRAINING.md."""
