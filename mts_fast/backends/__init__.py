"""The ways to run an op: which serves (registry), C++ (cpp) and Triton (triton)."""
