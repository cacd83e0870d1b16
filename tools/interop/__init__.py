"""Other people's software, unmodified, on a kvfs mount: `make interop`.

Layer: tool.

- `peers/` has a module per peer. Its first half runs in kvfs's own venv and names the cases; its
  second half, started with -m in the peer's venv, drives the peer.
- `requirements/` pins what each venv holds. Nothing of the peers' source is kept here.
"""
