"""`mts-fast demo`: MTS on real data with planted generator failures."""
