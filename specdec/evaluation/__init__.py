"""Measuring drafters side by side: questions, methods, the interleaved run, its records and their summary."""
