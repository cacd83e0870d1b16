"""Plug-ins for serving engines: each translates between an engine and kvfs's public surface.

Layer: L5.

A plug-in imports its engine; nothing else of kvfs does. Each is one module that the engine loads by
name, with helpers whose names begin like it.
"""
