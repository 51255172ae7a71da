"""Observers: objects that receive the events of a fit, and print, log, count or display them."""
