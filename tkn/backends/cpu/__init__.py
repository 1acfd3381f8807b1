"""The ROI engine: convolutions computed inside their kernels' ROIs only, on the CPU. docs/engine.md explains it.

- The kernels: kernels.cpp with rows.h, bfloat16.h, weight_grad.h (large batches), maps.h (small ones) and vector.h;
  compiled by library.py, held against torch by check.py; their structures in structs.py.
- Rows: rows.py says which numbers live where, kernels.py calls the kernels on them.
- A layer: target.py runs it, choose.py decides how, autograd.py gives it gradients.
- A network: graph.py reads its operations, fuse.py joins them, lowering.py with lower_rows.py and lower_maps.py turns
  them into the kernels', parts.py runs these, dense.py does the same by torch; plan.py is what users call.
- What is dense all the same, faster: weigh.py, the product with a window; fourier.py, convolutions of many channels.
"""
