"""Who calls, and whose things a caller may see and change."""
