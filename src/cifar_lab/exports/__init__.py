"""What `export` writes: a run's network for use elsewhere, one file per format."""
