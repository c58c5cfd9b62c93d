"""Text from a source to a corpus that a loader reads: what `apps.topk.prepare` is made of."""
