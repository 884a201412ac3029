"""Model files: the GGUF container and its weight formats."""
