"""The demo: a real model whose context outlives the process that computed it.

Layer: L5.

Run it with `kvfs demo` (or `make demo`, which installs what it needs). Torch and transformers are
imported by `model`, `cache` and `restore` alone, on use.
"""
