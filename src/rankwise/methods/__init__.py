"""What may train: one frozen value and one plan for each method."""
