"""The passes: transformations of a float layer before its linears are rounded.

A pass takes a layer and the statistics of its inputs, and returns an equivalent layer that loses less when it
is rounded, with the statistics of its inputs. After ``rotate_inner`` it is equivalent if the input of
down_proj is rotated, too. ``convert.quantize_layer.passes`` lists the passes of a recipe, each bound to the
configuration of the float model and to the recipe.
"""

from __future__ import annotations

import functools

from convert.calibrate.statistics import LayerStatistics
from convert.float_model import FloatParams

Pass = functools.partial[tuple[FloatParams, LayerStatistics]]
