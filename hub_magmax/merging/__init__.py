"""A plan carried out: tensors streamed, merged and written."""
