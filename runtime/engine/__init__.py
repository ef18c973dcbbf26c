"""One step of a model at a time: who is in it, what memory it takes, what it makes of whom."""
