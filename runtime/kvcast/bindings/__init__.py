"""kvcast.h in ctypes, and the library that has it."""
