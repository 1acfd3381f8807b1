"""What a run keeps in its folder: metrics, ROIs, checkpoints and its summary; and what an earlier run left there."""
