"""What torch computes faster when asked another way: products with windows, convolutions in the frequency domain."""
