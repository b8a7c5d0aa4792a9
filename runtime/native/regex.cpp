// Regular expressions of the tokenizers. libstdc++'s matcher calls itself once per character of a run, which ends the process on a long
// one; this one backtracks over a stack of its own and tries no state twice: one that failed at a place fails there for every match.
#include "kvcast-tokenizer.h"
#include "regex_parser.h"

#include <algorithm>
#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <map>
#include <regex>
#include <utility>

namespace {

struct instruction {
    enum kind_t { SET, RUN, SPLIT, JUMP, PEEK, LOOK, END, MATCH } kind;
    int target; // SPLIT: the second choice; JUMP, LOOK: where to go on; SET, RUN, PEEK: which set
    bool negative;
    int memo; // of SPLIT and RUN, where paths meet: row of the memory of what failed; else -1
};

struct program {
    std::vector<instruction> code;
    std::vector<charset> sets;
    int n_memo = 0;

    explicit program(const node & root) {
        compile(root);
        emit(instruction::MATCH);
    }

  private:
    int emit(instruction::kind_t kind, int target = 0, bool negative = false) {
        const bool meets = kind == instruction::SPLIT || kind == instruction::RUN;
        code.push_back({kind, target, negative, meets ? n_memo++ : -1});
        return (int) code.size() - 1;
    }

    int keep(const charset & set) {
        sets.push_back(set);
        return (int) sets.size() - 1;
    }

    void compile(const node & n) {
        switch (n.kind) {
            case node::SET:
                emit(instruction::SET, keep(n.set));
                break;
            case node::END:
                emit(instruction::END);
                break;
            case node::SEQUENCE:
                for (const auto & part : n.parts) {
                    compile(part);
                }
                break;
            case node::ALTERNATIVES: {
                std::vector<int> ends;
                for (size_t i = 0; i + 1 < n.parts.size(); ++i) {
                    const int split = emit(instruction::SPLIT);
                    compile(n.parts[i]);
                    ends.push_back(emit(instruction::JUMP));
                    code[split].target = (int) code.size();
                }
                compile(n.parts.back());
                for (const int end : ends) {
                    code[end].target = (int) code.size();
                }
                break;
            }
            case node::LOOK_AHEAD:
                if (n.parts[0].kind == node::SET) {
                    emit(instruction::PEEK, keep(n.parts[0].set), n.negative);
                } else {
                    const int look = emit(instruction::LOOK, 0, n.negative);
                    compile(n.parts[0]);
                    emit(instruction::MATCH);
                    code[look].target = (int) code.size();
                }
                break;
            case node::REPEAT:
                repeat(n);
                break;
        }
    }

    void repeat(const node & n) {
        const node & part = n.parts[0];
        for (int i = 0; i < n.min; ++i) {
            compile(part);
        }
        if (n.max == MANY && part.kind == node::SET) {
            emit(instruction::RUN, keep(part.set));
            return;
        }
        std::vector<int> splits;
        const int n_more = n.max == MANY ? 1 : n.max - n.min;
        for (int i = 0; i < n_more; ++i) {
            splits.push_back(emit(instruction::SPLIT));
            compile(part);
        }
        if (n.max == MANY) {
            emit(instruction::JUMP, splits[0]);
        }
        for (const int split : splits) {
            code[split].target = (int) code.size();
        }
    }
};

class matcher {
  public:
    matcher(const program & p, const std::vector<uint32_t> & text)
        : p(p), text(text), failed(p.n_memo * (text.size() + 1)), held(failed.size()) {}

    void split(size_t first, size_t last, std::vector<size_t> & pieces) {
        end = last;
        forget(first); // the end of the part before is the beginning of this one
        size_t done = first, from = first;
        for (bool more = true; more;) {
            ptrdiff_t to = -1;
            for (; from <= end && (to = match(from, false)) < 0; ++from) {
            }
            more = to >= 0;
            while (to >= 0) {
                if (from > done) {
                    pieces.push_back(from - done);
                }
                pieces.push_back(to - from);
                const bool empty = (size_t) to == from;
                done = from = to;
                to = -1;
                if (empty) { // std::regex_iterator asks for more than nothing at the same place, and at the end for nothing more
                    more = from < end;
                    if (more && (to = match(from, true)) < 0) {
                        ++from;
                    }
                }
            }
        }
        if (done < end) {
            pieces.push_back(end - done);
        }
    }

  private:
    struct choice {
        int pc, step;
        size_t first, last; // places to go on from, the last one first
    };
    struct step { // on the way here, where paths meet
        size_t bit;
        int before;
    };
    struct memory {
        std::vector<choice> choices;
        std::vector<step> steps;
    };

    void forget(size_t pos) { std::fill_n(failed.begin() + pos * p.n_memo, p.n_memo, false); }

    ptrdiff_t match(size_t from, bool some) {
        const ptrdiff_t to = run(0, from, false, some, of_matches);
        if (some && to < 0) {
            forget(from); // states of an empty match that did not count have not failed
        }
        return to;
    }

    // Where the match from pos ends; -1: there is none. some: an empty one does not count.
    ptrdiff_t run(int pc, size_t pos, bool looking, bool some, memory & own) {
        const size_t from = pos;
        auto & [choices, steps] = own;
        steps.clear();
        choices.clear();
        choices.push_back({pc, -1, pos, pos});
        while (!choices.empty()) {
            choice & top = choices.back();
            pc = top.pc;
            pos = top.last;
            int at = top.step;
            if (top.first == top.last) {
                choices.pop_back();
            } else {
                --top.last;
            }
            for (bool alive = true; alive;) {
                const auto & now = p.code[pc];
                if (now.memo >= 0) {
                    const size_t bit = pos * p.n_memo + now.memo;
                    if (looking && held[bit]) {
                        return hold(steps, at, pos, looking);
                    }
                    if (failed[bit]) {
                        break;
                    }
                    failed[bit] = true; // unless what follows holds
                    steps.push_back({bit, at});
                    at = (int) steps.size() - 1;
                }
                switch (now.kind) {
                    case instruction::SET:
                        alive = pos < end && p.sets[now.target].has(text[pos]);
                        ++pos;
                        ++pc;
                        break;
                    case instruction::RUN: {
                        const auto & set = p.sets[now.target];
                        const size_t first = pos;
                        while (pos < end && set.has(text[pos])) {
                            ++pos;
                            if (!looking) { // from there on it is a part of what is tried now
                                failed[pos * p.n_memo + now.memo] = true;
                            }
                        }
                        ++pc;
                        if (pos > first) {
                            choices.push_back({pc, at, first, pos - 1});
                        }
                        break;
                    }
                    case instruction::SPLIT:
                        choices.push_back({now.target, at, pos, pos});
                        ++pc;
                        break;
                    case instruction::JUMP:
                        pc = now.target;
                        break;
                    case instruction::PEEK:
                        alive = (pos < end && p.sets[now.target].has(text[pos])) != now.negative;
                        ++pc;
                        break;
                    case instruction::LOOK: {
                        memory looks;
                        alive = (run(pc + 1, pos, true, false, looks) >= 0) != now.negative;
                        pc = now.target;
                        break;
                    }
                    case instruction::END:
                        alive = pos == end;
                        ++pc;
                        break;
                    case instruction::MATCH:
                        if (!some || pos > from) {
                            return hold(steps, at, pos, looking);
                        }
                        alive = false;
                        break;
                }
            }
        }
        return -1;
    }

    // what is on the way to a match has not failed; nor has a run that may have ended where the match does
    ptrdiff_t hold(const std::vector<step> & steps, int at, size_t pos, bool looking) {
        for (; at >= 0; at = steps[at].before) {
            const size_t bit = steps[at].bit;
            failed[bit] = failed[pos * p.n_memo + bit % p.n_memo] = false;
            held[bit] = looking;
        }
        return (ptrdiff_t) pos;
    }

    const program & p;
    const std::vector<uint32_t> & text;
    size_t end = 0;
    std::vector<bool> failed, held; // [place][n_memo]; held: of look aheads only
    memory of_matches;
};

template <typename Char, typename Unsigned>
std::vector<size_t> split(
        const std::basic_string<Char> & text, const std::basic_string<Char> & expression, const std::vector<size_t> & parts) {
    static thread_local std::map<std::basic_string<Char>, program> programs; // as many as llama.cpp has expressions
    auto found = programs.find(expression);
    if (found == programs.end()) {
        std::vector<uint32_t> chars;
        for (const Char c : expression) {
            chars.push_back((Unsigned) c);
        }
        found = programs.emplace(expression, program(parser(chars).parse())).first;
    }
    std::vector<uint32_t> chars(text.size());
    std::transform(text.begin(), text.end(), chars.begin(), [](Char c) { return (uint32_t) (Unsigned) c; });
    matcher m(found->second, chars);
    std::vector<size_t> pieces;
    size_t first = 0;
    for (const size_t part : parts) {
        m.split(first, first + part, pieces);
        first += part;
    }
    return pieces;
}

} // namespace

std::vector<size_t> kvcast_regex_split(const std::string & text, const std::string & expression, const std::vector<size_t> & parts) {
    return split<char, uint8_t>(text, expression, parts);
}

std::vector<size_t> kvcast_regex_split(const std::wstring & text, const std::wstring & expression, const std::vector<size_t> & parts) {
    return split<wchar_t, uint32_t>(text, expression, parts);
}
