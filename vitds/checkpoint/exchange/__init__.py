"""Weights of every known format, in and out, a tensor at a time."""
