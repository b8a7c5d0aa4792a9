// What llama.cpp's grammar sampler calls: bounds, and errors that must not pass through the C API.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <stdexcept>

constexpr size_t KVCAST_MAX_STACKS = 2000;        // continuations of a text, kept from character to character
constexpr size_t KVCAST_MAX_STACKS_SEEN = 100000; // looked at on the way to them
constexpr int64_t KVCAST_MAX_WORK = 1 << 27;      // tokens and continuations looked at for one token of an answer: about a second

// Each token of the vocabulary is tried in all the ways in which the grammar can read it: 2^n for n characters that it can read twice.
inline thread_local int64_t kvcast_grammar_work = KVCAST_MAX_WORK;
inline void kvcast_grammar_spend(int64_t n) {
    if ((kvcast_grammar_work -= n) < 0) {
        throw std::runtime_error("the grammar can read a token in too many ways");
    }
}

// Keeps the message for kvcast_grammar_error, of this thread.
void kvcast_grammar_failed(const char * what);

template <typename Call>
bool kvcast_grammar_guarded(Call && call) {
    kvcast_grammar_work = KVCAST_MAX_WORK;
    try {
        call();
        return true;
    } catch (const std::exception & error) {
        kvcast_grammar_failed(error.what());
        return false;
    }
}
