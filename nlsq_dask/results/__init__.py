"""Results: reports, predictions, files and plots."""
