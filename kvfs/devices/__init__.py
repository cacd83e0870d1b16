"""Backing stores behind one interface.

Layer: L1.
"""
