"""The ROI engine: convolutions computed inside their kernels' ROIs only, on the CPU.

rows.py (which numbers live where) and library.py (compiling kernels.cpp) at the bottom, kernels.py between them and
Python, autograd.py for training, auto.py to choose, accelerate.py for whole networks.
"""
