"""What is drafted without heads: from the text, from others', from the target's words."""
