"""One function a reader: fed with arbitrary bytes, it may refuse with the reader's own error and nothing else."""
