"""One module per publisher's format; each yields the canonical interaction table and an item table."""
