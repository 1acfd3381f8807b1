"""What computes target layers, a room for each: torch, the CPU's kernels, the GPU's."""
