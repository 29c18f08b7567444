"""Many runs as one experiment: which they are, running them, and what they say together."""
