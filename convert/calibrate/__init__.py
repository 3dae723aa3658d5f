"""Calibration: chooses the calibration tokens, and measures statistics of the inputs of linears on them."""
