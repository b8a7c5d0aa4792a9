// What the patched tokenizer calls where llama.cpp's own means end on long texts (patches/README.md).
#pragma once

#include "llama.h"

#include <array>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

// Splits each part of a text into the matches of a regular expression and what lies between them. The result is that of
// std::regex_iterator (ECMAScript), but the stack does not grow with the text, and time grows no faster than the text.
// parts: characters of each part, one after another; returned are characters of each piece.
// Throws std::regex_error where the expression uses more of the syntax than llama.cpp's pre-tokenizers do.
std::vector<size_t> kvcast_regex_split(const std::string & text, const std::string & expression, const std::vector<size_t> & parts);
std::vector<size_t> kvcast_regex_split(const std::wstring & text, const std::wstring & expression, const std::vector<size_t> & parts);

// The special tokens of a vocabulary. They are cut out of a text one after another, each wherever what is left of the text holds it.
class kvcast_specials {
  public:
    struct part {
        llama_token token; // LLAMA_TOKEN_NULL: text
        size_t offset, length;
    };
    using attributes = std::function<llama_token_attr(llama_token)>;

    // in the order in which they are looked for
    void add(llama_token token, const std::string & text);

    // all: also those that only a template may write. Time grows no faster than the text, but for a logarithm.
    std::vector<part> split(const std::string & text, const attributes & of, bool all) const;

  private:
    struct special {
        llama_token token;
        size_t length;
    };
    std::vector<special> specials;
    // a trie: node 0 is the root, and the next of a node n by a byte c is nexts[256*n + c]
    std::unordered_map<uint64_t, uint32_t> nexts;
    std::vector<int32_t> ends = {-1}; // of each node: the special token that ends there
    std::array<bool, 256> firsts = {};
};
