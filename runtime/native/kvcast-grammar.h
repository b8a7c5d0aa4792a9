// What the patched grammar sampler calls (patches/README.md).
#pragma once

// A grammar cannot be followed any further; why: for people. Kept for the thread until kvcast_grammar_error asks.
void kvcast_grammar_failed(const char * why);
