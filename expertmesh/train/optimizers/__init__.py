"""What takes the step, one file for each, chosen by name."""
