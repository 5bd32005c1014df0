"""``specdec report``: what evaluation runs recorded, as one page that needs no network, and as PNG files.

Nothing is measured or defined here: every figure is read from the records of ``specdec evaluate``, whose definitions
are those of ``specdec.metrics``. This package selects, draws and lays out.
"""
