"""What a run will take and how its gradient is balanced, worked out before any weight is loaded."""
