"""Steering a checkpoint: which neurons are handles, what turning them does, and what it costs."""
