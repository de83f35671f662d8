"""What every driver must do in the same way: reading URLs and masking what is secret in them."""
