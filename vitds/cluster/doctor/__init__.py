"""Whether hosts can train together: `vitds doctor`, and what a training checks of them by itself."""
