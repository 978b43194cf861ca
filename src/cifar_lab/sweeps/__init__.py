"""Many runs: on this machine, on a cluster, or chosen by a search."""
