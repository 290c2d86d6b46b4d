"""Measurements of speed and memory, run by hand from the repository's root; not installed with the package."""
