"""Rows of data in memory, and the padded views of them that compiled programs take."""
