"""Rows of data in memory: what one consists of, blocks of them, and how they reach XLA."""
