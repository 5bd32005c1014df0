"""``specdec bench``: how near the step is to the hardware's limit, with the two numbers of every ratio.

Measures and records here; what a text is worth end to end is ``specdec.evaluation``'s, whose definitions are used.
"""
