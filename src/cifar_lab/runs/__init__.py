"""A run on disk: its files, each with its reader next to its writer, and what they hold."""
