"""The place of the GPU's kernels."""
