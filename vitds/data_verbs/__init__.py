"""`vitds data …`: making, indexing, measuring and cleaning sets of images. No training run needs this room."""
