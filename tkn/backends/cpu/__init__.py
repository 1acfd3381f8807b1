"""The CPU's ROI backend: target layers inside their ROIs only, forward and backward. docs/engine.md explains it.

- backend.py: what the operators ask of it. chain.py: layers one after the other. stage.py: one layer, forward and
  backward.
- rows.py says which numbers live where, kernels.py calls the kernels on them, structs.py mirrors their structures.
- csrc/: the kernels: kernels.cpp with rows.h, bfloat16.h, weight_grad.h (large batches), maps.h (small ones), vector.h.
- build.py compiles and opens them; check.py, in a child process, holds them against torch; factors.py measures them.
"""
