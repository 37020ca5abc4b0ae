"""Measures: what this machine can do, what our kernels and servers make of it, and what other servers do.

Nothing of the product imports this package. Every figure it prints was measured in the same run as the limits beside
it; it says which bars are met, and never decides whether a change is good.
"""
