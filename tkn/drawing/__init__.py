"""What a run shows of itself: pictures and tables of one network and its training."""
