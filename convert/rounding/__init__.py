"""Float weights to integers: to nearest, and by GPTQ."""
