"""Pages of the documentation, and the scripts that draw their pictures."""
