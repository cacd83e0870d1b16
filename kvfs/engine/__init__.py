"""The storage engine: format, log, index, catalog, store.

Layer: L2 and L3.
"""
