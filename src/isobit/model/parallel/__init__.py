"""Graphs cut for several processes, GPUs or machines: into parts that share every layer (tensor and
expert parallelism), or into stages of whole layers (pipeline parallelism)."""
