"""Plans: tensors to read, merge and write, and the memory for that."""
