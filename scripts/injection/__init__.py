"""Faults that ``faults.py`` injects: one function per kind, which injects number i and checks what comes after."""
