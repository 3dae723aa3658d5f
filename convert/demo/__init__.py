"""The real small model of ``make demo``, and what it is converted to."""
