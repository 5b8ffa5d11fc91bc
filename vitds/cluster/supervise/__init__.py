"""`vitds run`: a launcher's command, its signals, and its restarts."""
