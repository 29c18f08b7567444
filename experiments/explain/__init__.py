"""The command `explain`: value, origin, range and meaning of a key."""
