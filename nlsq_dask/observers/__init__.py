"""Observers: they receive the events of a fit and show or count them; they never change it."""
