"""Refines the rounding of a quantized model by training: its predictions come nearer to the float model's."""
