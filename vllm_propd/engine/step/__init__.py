"""One step with trees: rows, verification, commit, the next drafts."""
