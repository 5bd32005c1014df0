"""Passes of the target as graphs: traced once, compiled ahead of time and kept on disk, or captured on CUDA."""
