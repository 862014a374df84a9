"""Prompts that were evaluated before: in memory and in files, target state and rows, by longest common prefix."""
