"""Which layers a backbone is made of, which of them train, and how that is changed."""
