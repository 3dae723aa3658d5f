"""What calibration takes from texts and from the model: tokens, and statistics of the inputs of linears."""
