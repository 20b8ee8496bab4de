"""Where the bytes live: named, immutable objects."""
