"""Rounds float weights to integers: to nearest, or with GPTQ's error compensation."""
