"""Tasks and calls: their options, their arguments, and the handles that callers hold."""
