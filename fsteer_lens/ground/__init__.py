"""What every room stands on: files, tables, progress bars, and numbers with their uncertainty."""
