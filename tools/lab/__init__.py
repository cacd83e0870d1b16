"""The lab: a guest with CXL memory, persistent memory and an SSD, under QEMU's own processor.

Layer: tool.
"""
