"""Arguments, tiles, memory and plan of a fit for every pixel."""
