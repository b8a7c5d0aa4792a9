// What llama.cpp's grammar sampler calls: bounds, and errors that must not pass through the C API.
#pragma once

#include <cstddef>
#include <exception>

constexpr size_t KVCAST_MAX_STACKS      = 2000;   // continuations of a text, kept from character to character
constexpr size_t KVCAST_MAX_STACKS_SEEN = 100000; // looked at on the way to them

// Keeps the message for kvcast_grammar_error, of this thread.
void kvcast_grammar_failed(const char * what);

template <typename Call> bool kvcast_grammar_guarded(Call && call) {
    try {
        call();
        return true;
    } catch (const std::exception & error) {
        kvcast_grammar_failed(error.what());
        return false;
    }
}
