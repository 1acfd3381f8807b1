"""Training: the LightningModule, what a run keeps, and the run itself."""
