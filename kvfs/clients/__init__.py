"""A pool for many processes: one owns it, the others are its clients; docs/PROTOCOL.md.

Layer: see the modules; `remote` and what it needs are the client's, `server` and `session` the
owner's.
"""
