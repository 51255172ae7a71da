"""The arguments of ``fit`` on parameters: names, p0, bounds, fixed and ties."""
