// Special tokens in a text. llama.cpp searches the whole text for each of them, thousands of times with some vocabularies, and counts its
// list of pieces from the beginning at each that it finds; here one pass finds all of them.
#include "kvcast-tokenizer.h"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <map>

void kvcast_specials::add(llama_token token, const std::string & text) {
    uint64_t node = 0;
    for (const unsigned char c : text) {
        const auto [next, is_new] = nexts.try_emplace(256 * node + c, (uint32_t) ends.size());
        if (is_new) {
            ends.push_back(-1);
        }
        node = next->second;
    }
    if (node == 0 || ends[node] >= 0) {
        return; // empty, or another's text: never found
    }
    ends[node] = (int32_t) specials.size();
    firsts[(unsigned char) text[0]] = true;
    specials.push_back({token, text.size()});
}

std::vector<kvcast_specials::part> kvcast_specials::split(const std::string & text, const attributes & of, bool all) const {
    struct run { // of places that follow one another
        size_t first, last;
    };
    std::vector<std::vector<run>> places(specials.size());
    for (size_t i = 0; i < text.size(); ++i) {
        uint64_t node = 0;
        for (size_t j = i; j < text.size() && (node != 0 || firsts[(unsigned char) text[j]]); ++j) {
            const auto next = nexts.find(256 * node + (unsigned char) text[j]);
            if (next == nexts.end()) {
                break;
            }
            node = next->second;
            if (ends[node] >= 0) {
                auto & runs = places[ends[node]];
                if (!runs.empty() && runs.back().last + 1 == i) {
                    runs.back().last = i;
                } else {
                    runs.push_back({i, i});
                }
            }
        }
    }

    std::map<size_t, size_t> left; // what is text still: first and end
    if (!text.empty()) {
        left[0] = text.size();
    }
    std::vector<part> parts;
    for (size_t s = 0; s < specials.size(); ++s) {
        const auto [token, length] = specials[s];
        const auto attr = places[s].empty() ? LLAMA_TOKEN_ATTR_UNDEFINED : of(token);
        if (!all && (attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN))) {
            continue;
        }
        size_t from = 0;
        for (const auto & r : places[s]) {
            for (from = std::max(from, r.first); from <= r.last;) {
                auto piece = left.upper_bound(from);
                if (piece == left.begin() || from + length > std::prev(piece)->second) { // it is not within one: on to the next
                    from = piece == left.end() ? text.size() : piece->first;
                    continue;
                }
                --piece;
                const auto [first, end] = *piece;
                size_t before = from, after = from + length;
                while ((attr & LLAMA_TOKEN_ATTR_LSTRIP) && before > first && isspace((unsigned char) text[before - 1])) {
                    --before;
                }
                while ((attr & LLAMA_TOKEN_ATTR_RSTRIP) && after < end && isspace((unsigned char) text[after])) {
                    ++after;
                }
                if (before > first) {
                    piece->second = before;
                } else {
                    left.erase(piece);
                }
                if (after < end) {
                    left[after] = end;
                }
                parts.push_back({token, from, length});
                from = after;
            }
        }
    }
    for (const auto & [first, end] : left) {
        parts.push_back({LLAMA_TOKEN_NULL, first, end - first});
    }
    std::sort(parts.begin(), parts.end(), [](const part & a, const part & b) { return a.offset < b.offset; });
    return parts;
}
