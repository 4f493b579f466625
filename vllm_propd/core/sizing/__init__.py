"""How many nodes a step verifies, and what that costs."""
