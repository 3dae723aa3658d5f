"""Kernels for the CPU at hand, written in Python, that XLA calls inside of a compiled program.

A kernel is made of functions of Numba, which read and write memory by its address. What they are written
with:

* ``memory.py``: loads, stores, atomic operations, and memory on the stack;
* ``vectors.py``: vectors of 16 lanes;
* ``instruction_sets.py`` and ``dot_products.py``: everything that differs between CPUs;
* ``tiles.py``, ``float_tiles.py``, ``float_weights.py``: products; ``rows.py``: quantization of rows.

``frame.py`` is what XLA calls, and runs the blocks of a kernel on XLA's threads. ``build.py`` compiles
kernels, keeps their machine code on disk, and registers them with XLA.

The kernel of an op is two files in the op's folder. ``native_cpu.py`` is the implementation that ``dispatch``
knows: it checks the call and hands its arrays to the kernel (``operands.py``, ``rows_call.py``, ``cache.py``,
``config.py``). ``native_kernel.py`` has the functions of Numba; only ``build.py`` imports it, to compile
them.
"""
