"""A GPU that is not there: see device.cpp, and checks.py for what it shows."""
