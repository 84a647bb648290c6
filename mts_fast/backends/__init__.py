"""Implementations of ops: which one runs (registry), C++ and CUDA (cpp), and Triton (triton)."""
