"""Rows in memory: their layout, blocks of them, and padded views for XLA."""
