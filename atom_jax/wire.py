"""Values as bytes and back, for messages between processes: named tuples of arrays, numbers and text.

Bytes are data only, whoever sends them: what they can become is in a table of types. (A pickle can run code.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LENGTH = struct.Struct("!Q")


def encode(value: Any) -> bytes:
    """A value as bytes.

    Args:
      value: None, a number, text, an array of NumPy or of JAX (random keys included), or a tuple, a list, a
        dict, a named tuple or a dataclass of values.
    """
    arrays: list[np.ndarray] = []

    def plain(node: Any) -> Any:
        if isinstance(node, jax.Array):
            if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
                return {"key": str(jax.random.key_impl(node)), "data": plain(jax.random.key_data(node))}
            return plain(np.asarray(node))
        if isinstance(node, np.ndarray | np.generic):
            arrays.append(np.asarray(node))
            return {"array": len(arrays) - 1}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return {"type": type(node).__name__, "fields": [plain(field) for field in node]}
        if dataclasses.is_dataclass(node):
            fields = [plain(getattr(node, field.name)) for field in dataclasses.fields(node)]
            return {"type": type(node).__name__, "fields": fields}
        if isinstance(node, Mapping):
            return {"mapping": {name: plain(each) for name, each in node.items()}}
        return [plain(each) for each in node] if isinstance(node, list | tuple) else node

    tree = plain(value)
    header = json.dumps([tree, [[array.dtype.name, array.shape] for array in arrays]]).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *(array.tobytes() for array in arrays)])


def decode(data: bytes, types: Mapping[str, type]) -> Any:
    """The value of which ``encode`` has made ``data``; lists become tuples, and all arrays NumPy's.

    Args:
      data: bytes.
      types: the named tuples and dataclasses that it may have, by name.

    Raises:
      KeyError: it has another type.
    """
    (length,) = _LENGTH.unpack_from(data)
    place = _LENGTH.size + length
    tree, kinds = json.loads(data[_LENGTH.size : place])
    arrays = []
    for name, shape in kinds:
        dtype = np.dtype(name)
        array = np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape)
        arrays.append(array)
        place += array.nbytes

    def rich(node: Any) -> Any:
        if isinstance(node, list):
            return tuple(map(rich, node))
        if not isinstance(node, dict):
            return node
        if "array" in node:
            return arrays[node["array"]]
        if "key" in node:
            return jax.random.wrap_key_data(rich(node["data"]), impl=node["key"])
        if "mapping" in node:
            return {name: rich(each) for name, each in node["mapping"].items()}
        return types[node["type"]](*map(rich, node["fields"]))

    return rich(tree)
