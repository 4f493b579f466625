"""What runs on the device: tree attention and the early head's counts."""
