"""What a trained network's kernels look at, and what they are worth."""
