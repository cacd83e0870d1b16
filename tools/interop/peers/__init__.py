"""The peers, a module each.

Layer: tool.
"""
