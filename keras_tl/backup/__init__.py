"""The whole state of a run, on disk, for a run that resumes after it was killed."""
