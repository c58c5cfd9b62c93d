"""Defaults of flags that programs share. Without torch, so that --help answers at once."""

# Slots of the cache of keys and values, of all texts of a batch together.
BATCH_TOKENS = 2**14
