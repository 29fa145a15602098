"""Text files and tables to batches."""
