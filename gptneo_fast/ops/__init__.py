"""Every op: declared, specified in plain torch, computed on the CPU, chosen by backend, sampled and budgeted for tests.

Tensors in, tensors out; what enters knows nothing of models, caches in Python or files.
"""
