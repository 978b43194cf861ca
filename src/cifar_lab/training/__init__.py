"""From a RunConfig to one run: splits, model, optimizer, the loop, the scores."""
