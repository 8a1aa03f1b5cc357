"""Numbered, append-only migrations: one that was released is never changed."""
