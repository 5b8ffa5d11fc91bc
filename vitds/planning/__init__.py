"""Arithmetic about runs before they are made: what ranks send, and how long a step takes on how many GPUs."""
