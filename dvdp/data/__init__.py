"""From raw images to the training stream: sources -> transforms -> store (LMDB) -> loading.

Nothing is imported here: loading needs torch alone, the rest lmdb and albumentations.
"""
