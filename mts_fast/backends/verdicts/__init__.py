"""What was measured on this machine: which backend `auto` takes for which tensors."""
