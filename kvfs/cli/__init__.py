"""The commands `kvfs` and `kvfs-admin`.

Layer: L5. Nothing here imports the engine at module level: a command pays for what it uses.
"""
