"""What is fitted at every pixel: arguments, tiles, memory and plan."""
