"""Results as tables, CSV and lines of text."""
