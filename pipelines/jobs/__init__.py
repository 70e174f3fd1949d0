"""A setting as work: what it is, where it lies, how it is trained, sampled and scored on Ray."""
