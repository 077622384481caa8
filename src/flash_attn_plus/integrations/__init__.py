"""Other libraries behind this one's operators: selected by the caller, imported on the first call that needs them."""
