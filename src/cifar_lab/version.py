"""The versions of the package and of what it computes; importing this imports nothing else."""

__version__ = "1.0.0"

RESULTS_VERSION = 1
"""Raised by hand when a change of the code changes results bit for bit.

A finished run of another version is not reused silently, and a stopped one is not resumed.
"""
