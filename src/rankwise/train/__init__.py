"""One training loop for every method, and the run folder it leaves behind."""
