"""Models whose attention bsa_compile knows."""
