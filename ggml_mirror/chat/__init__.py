"""The chat in the terminal (``ggml-mirror run``)."""
