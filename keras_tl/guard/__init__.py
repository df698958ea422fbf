"""Whether weights have changed, at which moment, and why."""
