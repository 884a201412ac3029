"""The device: memory, compiled kernels, copies, how weights lie there. Knows nothing of graphs."""
