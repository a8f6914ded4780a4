"""Optimisers, their parameter groups, and clipping."""
