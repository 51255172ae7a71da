"""The model of the caller: traced, differentiated, compiled, checked."""
