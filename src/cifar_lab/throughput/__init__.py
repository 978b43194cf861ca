"""What `benchmark` measures: variants of the training step, and the baseline loop."""
