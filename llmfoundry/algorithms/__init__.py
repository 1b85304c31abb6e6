"""Algorithms beside what Composer offers."""
