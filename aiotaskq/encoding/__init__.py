"""Values, messages and exceptions as bytes."""
