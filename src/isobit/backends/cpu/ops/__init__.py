"""The operations of the CPU backend, one kind a file: how it is lowered; in C++ beside it, how it
runs."""
