"""The report of one run: curves, final numbers, samples and config on one page."""
