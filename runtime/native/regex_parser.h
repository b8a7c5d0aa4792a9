// Regular expressions of the tokenizers, read: sets of characters and a tree. For regex.cpp alone.
#pragma once

#include <algorithm>
#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <map>
#include <regex>
#include <utility>

namespace {

constexpr uint32_t LAST = UINT32_MAX;
constexpr int MANY = INT_MAX;

[[noreturn]] void unsupported() { throw std::regex_error(std::regex_constants::error_complexity); }

class charset {
  public:
    void add(uint32_t first, uint32_t last) { ranges.push_back({first, last}); }
    void add(const charset & other) { ranges.insert(ranges.end(), other.ranges.begin(), other.ranges.end()); }
    // sorts and joins the ranges: to be called before the following
    void finish() {
        std::sort(ranges.begin(), ranges.end());
        std::vector<std::pair<uint32_t, uint32_t>> joined;
        for (const auto & r : ranges) {
            if (!joined.empty() && (joined.back().second == LAST || r.first <= joined.back().second + 1)) {
                joined.back().second = std::max(joined.back().second, r.second);
            } else {
                joined.push_back(r);
            }
        }
        ranges = std::move(joined);
        for (uint32_t c = 0; c < low.size(); ++c) {
            low[c] = search(c);
        }
    }
    charset others() const {
        charset result;
        uint32_t next = 0;
        for (const auto & r : ranges) {
            if (r.first > next) {
                result.add(next, r.first - 1);
            }
            next = r.second + 1; // 0 after the last of all
        }
        if (ranges.empty() || next != 0) {
            result.add(next, LAST);
        }
        result.finish();
        return result;
    }
    charset common(const charset & other) const {
        charset neither = others();
        neither.add(other.others());
        neither.finish();
        return neither.others();
    }
    bool has(uint32_t c) const { return c < low.size() ? low[c] : search(c); }

  private:
    bool search(uint32_t c) const {
        const auto after = std::upper_bound(ranges.begin(), ranges.end(), std::make_pair(c, LAST));
        return after != ranges.begin() && c <= std::prev(after)->second;
    }
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    std::array<bool, 256> low = {};
};

struct node {
    enum kind_t { SEQUENCE, ALTERNATIVES, SET, REPEAT, LOOK_AHEAD, END } kind;
    std::vector<node> parts;
    charset set;
    int min = 1, max = 1;  // of a REPEAT
    bool negative = false; // of a LOOK_AHEAD
};

node of_set(charset set) {
    set.finish();
    return {node::SET, {}, std::move(set)};
}

class parser {
  public:
    explicit parser(const std::vector<uint32_t> & expression) : text(expression) {}

    node parse() {
        node result = alternatives();
        if (at != text.size()) {
            unsupported();
        }
        return result;
    }

  private:
    bool is(uint32_t c) const { return at < text.size() && text[at] == c; }
    bool take(uint32_t c) { return is(c) && ++at; }
    uint32_t next() {
        if (at == text.size()) {
            unsupported();
        }
        return text[at++];
    }

    node alternatives() {
        node result{node::ALTERNATIVES, {}, {}};
        do {
            result.parts.push_back(sequence());
        } while (take('|'));
        return result.parts.size() == 1 ? std::move(result.parts[0]) : result;
    }

    node sequence() {
        node result{node::SEQUENCE, {}, {}};
        while (at < text.size() && !is('|') && !is(')')) {
            node part = quantified(atom());
            const bool seen = !result.parts.empty() && result.parts.back().kind == node::LOOK_AHEAD && !result.parts.back().negative &&
                    result.parts.back().parts[0].kind == node::SET;
            if (seen && part.kind == node::SET) { // (?=[a])[b] is one character
                part.set = part.set.common(result.parts.back().parts[0].set);
                result.parts.pop_back();
            }
            result.parts.push_back(std::move(part));
        }
        return result.parts.size() == 1 ? std::move(result.parts[0]) : result;
    }

    node quantified(node part) {
        int min = 1, max = 1;
        if (take('*')) {
            min = 0, max = MANY;
        } else if (take('+')) {
            max = MANY;
        } else if (take('?')) {
            min = 0;
        } else if (take('{')) {
            min = max = number();
            if (take(',')) {
                max = is('}') ? MANY : number();
            }
            if (!take('}') || max < min) {
                unsupported();
            }
        } else {
            return part;
        }
        if (is('?') || is('*') || is('+') || is('{') || part.kind == node::LOOK_AHEAD || part.kind == node::END) {
            unsupported();
        }
        node result{node::REPEAT, {}, {}, min, max};
        result.parts.push_back(std::move(part));
        return result;
    }

    int number() {
        int n = 0;
        const size_t first = at;
        while (at < text.size() && text[at] >= '0' && text[at] <= '9' && n < 1000) {
            n = 10 * n + (int) (text[at++] - '0');
        }
        if (at == first || n > 1000) {
            unsupported();
        }
        return n;
    }

    node atom() {
        charset set;
        switch (const uint32_t c = next()) {
            case '(':
                return group();
            case '[':
                return of_set(bracket());
            case '$':
                return {node::END, {}, {}};
            case '\\':
                set.add(escaped());
                return of_set(std::move(set));
            case '.':
            case '^':
            case '*':
            case '+':
            case '?':
            case '{':
            case '}':
            case ']':
                unsupported();
            default:
                set.add(c, c);
                return of_set(std::move(set));
        }
    }

    node group() {
        node result{node::SEQUENCE, {}, {}};
        if (take('?')) {
            const uint32_t kind = next();
            if (kind == ':') {
                result = alternatives();
            } else if (kind == '=' || kind == '!') {
                result.kind = node::LOOK_AHEAD;
                result.negative = kind == '!';
                result.parts.push_back(alternatives());
            } else {
                unsupported();
            }
        } else {
            result = alternatives();
        }
        if (!take(')')) {
            unsupported();
        }
        return result;
    }

    // after a backslash, in a bracket or outside; classes are those of the C locale
    charset escaped() {
        charset set;
        switch (const uint32_t c = next()) {
            case 's':
            case 'S':
                set.add('\t', '\r');
                set.add(' ', ' ');
                break;
            case 'd':
            case 'D':
                set.add('0', '9');
                break;
            case 'n':
                set.add('\n', '\n');
                break;
            case 'r':
                set.add('\r', '\r');
                break;
            case 't':
                set.add('\t', '\t');
                break;
            default:
                if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')) {
                    unsupported();
                }
                set.add(c, c);
        }
        set.finish();
        const uint32_t c = text[at - 1];
        return c == 'S' || c == 'D' ? set.others() : set;
    }

    charset bracket() {
        charset set;
        const bool negative = take('^');
        while (!take(']')) {
            uint32_t first = next();
            if (first == '\\') {
                charset named = escaped();
                first = text[at - 1];
                if (std::string("sSdDnrt").find((char) first) != std::string::npos && first < 128) {
                    set.add(named);
                    continue;
                }
            }
            uint32_t last = first;
            if (is('-') && at + 1 < text.size() && text[at + 1] != ']') {
                ++at;
                last = next();
                if (last == '\\') {
                    escaped();
                    last = text[at - 1];
                }
                if (last < first) {
                    unsupported();
                }
            }
            set.add(first, last);
        }
        set.finish();
        return negative ? set.others() : set;
    }

    const std::vector<uint32_t> & text;
    size_t at = 0;
};

} // namespace
