"""What a fit has found so far, on disk: nothing of it gets lost, and reading it runs no code."""
