"""What `benchmark` measures: a run's training loop and its parts, beside a baseline loop."""
