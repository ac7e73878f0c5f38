"""Where other people's tools meet claq; each module is imported by those who use that tool and by nobody else."""
