"""The Triton kernels, reached only from `bsa_compile.ops`, lazily."""
