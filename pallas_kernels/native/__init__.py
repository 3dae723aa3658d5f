"""Kernels for the CPU, written in Python, that XLA calls inside a compiled program.

``memory.py`` and ``vectors.py`` are the vocabulary: loads, stores and vectors of 16 lanes for functions of
Numba. ``instruction_sets.py`` has what differs between CPUs. ``frame.py`` is the call by XLA and the running
of blocks on its threads, ``build.py`` compiles, caches and registers. A kernel of an op is its
``native_kernel.py``, which only ``build.py`` imports, and ``native_cpu.py``, which calls it.
"""
