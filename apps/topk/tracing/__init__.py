"""The same neuron over the checkpoints of a run, and the same index over its layers."""
