"""The wgpu backend: the same bits on every GPU that WebGPU reaches."""
