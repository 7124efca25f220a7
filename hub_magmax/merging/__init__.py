"""Execution of a plan: tensors streamed, merged and written."""
