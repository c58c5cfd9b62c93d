"""The embedded host: Meta Lingua's module API on any device.

`lingua_topk.host` binds the two packages in here to the names `lingua` and
`apps.main`; nothing imports them under this path.
"""
