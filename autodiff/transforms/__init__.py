"""The public transforms, one family a file, each a short composition of `core`."""
