"""Drafters: one module per family. Imports ``specdec`` only."""

__owner__ = "specdec"
