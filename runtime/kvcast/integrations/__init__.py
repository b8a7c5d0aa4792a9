"""kvcast in other people's tools."""
