"""Sampled steps: stage 1 over all candidates, what is drawn of them, and how many."""
