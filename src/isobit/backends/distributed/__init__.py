"""One model over several processes, GPUs or machines: the bits are those of one."""
