"""What is timed, compiled and allocated before the first request."""
