"""Many small fits at once, one in each SIMD lane."""
