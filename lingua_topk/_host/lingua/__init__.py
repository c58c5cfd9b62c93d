"""Embedded host with the module API of Meta Lingua; see `lingua_topk.host`."""
