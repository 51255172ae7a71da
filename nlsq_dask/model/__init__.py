"""The caller's model: tracing, differentiation, compilation and checks."""
