"""Verifiers: tree attention and acceptance rules. Imports ``specdec`` only."""

__owner__ = "specdec"
