"""The demo of ``make demo``: fetches a small real model and converts it in several ways."""
