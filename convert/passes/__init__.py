"""What is done to a float layer before its linears are rounded.

A pass takes a layer and what calibration knows of it, and returns both: a layer that computes the same and
loses less when it is rounded. ``convert.quantize_layer.passes`` lists those of a recipe, each bound to the
configuration of the float model and to the recipe.
"""

from __future__ import annotations

import functools

from convert.calibrate.statistics import LayerStatistics
from convert.float_model import FloatParams

Pass = functools.partial[tuple[FloatParams, LayerStatistics]]
