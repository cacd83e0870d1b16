"""What runs in the guest.

Layer: tool.
"""
