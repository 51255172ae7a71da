"""What a person reads: results, reports, predictions, files and pictures."""
