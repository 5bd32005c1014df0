"""Attention over a tree, and the move of what was accepted, as kernels of our own (Triton), each beside its definition.

``plain.py`` holds the definitions, ``tree_attention.py`` and ``compaction.py`` the kernels, ``backend.py`` what a
target is given, ``bench.py`` what measures them on a GPU.
"""
