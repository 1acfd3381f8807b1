"""Whole networks: their graph, what of it can be joined, its lowering to the kernels, the plan that runs it."""
