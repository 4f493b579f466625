"""Side-by-side measurement: every claim about speed comes from here."""
