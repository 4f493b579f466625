"""What becomes a tree's nodes, and what they are worth."""
