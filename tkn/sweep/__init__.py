"""What sweeps need beyond single runs."""
