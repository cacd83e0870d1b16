"""A context memory for LLM inference.

Layer: public surface.
"""
