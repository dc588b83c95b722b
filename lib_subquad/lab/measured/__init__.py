"""What *automatic* goes by on this very device: measured here, kept in a file."""
