"""What crosses the threshold: files written whole or not at all, and read with suspicion."""
