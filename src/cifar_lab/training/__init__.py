"""Training: one run, from its config to scored weights."""

import os

# cuBLAS reads it at its first call, and is deterministic with it only: too late once a run starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
