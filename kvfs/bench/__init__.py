"""The bench: how near kvfs comes to what the machine can do.

Layer: L5.

`kvfs bench` runs it. Every figure is measured against a baseline of the same run, the two taking
turns, so that the ratio holds on a machine that is busy or slow. docs/BENCHMARKS.md says what each
figure means, and where kvfs misses its goal and why.
"""
