"""What one bad task, one dead process or one bad moment may cost: at most itself, and never a hang."""
