"""A fit for every pixel: many small independent fits, tile by tile."""
