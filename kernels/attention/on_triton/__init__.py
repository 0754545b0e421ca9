"""Attention over the tiles of a plan in Triton: forward, and a backward that gives the same bits each time."""
