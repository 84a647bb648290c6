"""What `mts-fast train` does: folders or lists of samples to weights and a better classifier."""
