"""The target layer as an operation: what it computes, and which engine computes it."""
