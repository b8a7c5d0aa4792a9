"""Fixtures of several modules here."""

from hostile import subject as subject
