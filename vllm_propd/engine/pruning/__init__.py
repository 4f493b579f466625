"""A forward pass in two halves, trees pruned between them."""
