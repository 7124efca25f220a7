"""A plan: tensors to read, merge and write, and the memory that takes."""
