"""Whole networks: captured as a graph, lowered to the kernels, run; and kept in files. docs/engine.md explains it.

- From a network to a graph: trace.py, capture.py, modules.py and vocabulary.py (what torch runs) make graph.py's nodes.
- From a graph to the kernels: neighbours.py reorders channels, fuse.py joins operations, pairing.py says what is
  multiplied in bfloat16, lowering.py with lower_rows.py and lower_maps.py (maps.py, plane_convs.py, channel_convs.py)
  makes lists, parts.py runs them, arrange.py chooses; dense.py computes the same by torch, compare.py says whether
  results agree.
- Files: file.py with encode.py and decode.py; sizes.py and guard.py know what a graph makes before it is computed.
- ready.py tries a machine's kernels by check.py; plan.py is what users call.
"""
