"""How arms are timed: turns, paired chunks, steps."""
