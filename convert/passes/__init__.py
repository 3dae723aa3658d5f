"""What is done to a float layer before its linears are rounded.

A pass takes a layer and what calibration knows of it, and returns both: a layer that computes the same and
loses less when it is rounded. ``convert.quantize_layer.passes`` lists those of a recipe.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from atom_jax.config import ModelConfig
from convert.calibrate.statistics import LayerStatistics

Layer = dict[str, np.ndarray]
Pass = Callable[[Layer, LayerStatistics, ModelConfig], tuple[Layer, LayerStatistics]]
