"""Records, collation and the built-in tasks."""
