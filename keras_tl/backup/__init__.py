"""The whole state of a run, on disk, for a run that goes on after it was killed."""
