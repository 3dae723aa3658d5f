"""Programs that print and save the numbers that README and docs quote."""
