"""What the objects in a store mean; specified byte by byte in docs/format.md."""
