"""What arms are given to do."""
