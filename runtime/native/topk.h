// The largest of many numbers. Included by kernels-impl.h after simd.h: local to each file, and without templates of the standard
// library, which the linker would share between instruction sets.

#include <cstring>

namespace {

inline int32_t bits_of(float x) {
    int32_t b;
    memcpy(&b, &x, sizeof(b));
    return b;
}

// f(i) for every i < n, ascending, for which the bits of x[i] are above t
template <class F>
inline void for_above(const float * x, int n, int32_t t, F && f) {
    const int n_vec = n / W * W;
    for (int i = 0; i < n_vec; i += W) {
        for (uint32_t mask = above(x + i, t); mask; mask &= mask - 1) {
            f(i + lowest(mask));
        }
    }
    for (int i = n_vec; i < n; ++i) {
        if (bits_of(x[i]) > t) {
            f(i);
        }
    }
}

// Floats from zero up are ordered as their bits are, and negative ones lie below them. A search for the bits that k of them exceed: it
// counts for three candidates at a time, around the hint first, until few are left, which are then looked at alone.
void topk(const float * x, int n, int k, int32_t * out, int32_t * work, int32_t * hint) {
    constexpr int FEW = 256;
    constexpr int32_t NEAR = 1 << 21;    // a quarter more or less
    int32_t low = -1, high = 0x7ffffffe; // more than k are above low, at most k above high
    int n_low = n, n_high = 0;           // how many
    int32_t t[3] = {0x20000000, 0x30000000, 0x3c000000};
    if (*hint > NEAR && *hint < high - NEAR) {
        t[0] = *hint - NEAR, t[1] = *hint, t[2] = *hint + NEAR;
    }
    while (high - low > 1 && n_low - n_high > FEW && n_high < k) {
        int c[3] = {};
        for (int i = 0; i < n; ++i) {
            const int32_t b = bits_of(x[i]);
            c[0] += b > t[0];
            c[1] += b > t[1];
            c[2] += b > t[2];
        }
        for (int j = 0; j < 3; ++j) {
            if (c[j] > k) {
                low = t[j], n_low = c[j];
            } else if (t[j] < high) {
                high = t[j], n_high = c[j];
                break;
            }
        }
        const int32_t step = high / 4 - low / 4 > 0 ? high / 4 - low / 4 : 1;
        for (int j = 0; j < 3; ++j) {
            t[j] = high - low > (j + 1) * (int64_t) step ? low + (j + 1) * step : high;
        }
    }
    int m = 0;
    for_above(x, n, low, [&](int i) {
        work[m] = bits_of(x[i]);
        m += work[m] <= high;
    });
    const int wanted = k - n_high; // of those between
    n_high = 0;
    while (high - low > 1 && n_high < wanted && wanted < m) {
        const int32_t middle = low + (high - low) / 2;
        int c = 0;
        for (int i = 0; i < m; ++i) {
            c += work[i] > middle;
        }
        if (c > wanted) {
            low = middle;
        } else {
            high = middle, n_high = c;
        }
    }
    // those above `high` are in, and so many of those equal to it; or all that are not negative, and so many of the others
    const bool all = wanted >= m;
    const int32_t least = all ? -1 : high;
    int n_equal = all ? wanted - m : wanted - n_high;
    *hint = high;
    int n_out = 0;
    for_above(x, n, all ? INT32_MIN : least - 1, [&](int i) {
        const int32_t b = bits_of(x[i]);
        const bool equal = all ? b < 0 : b == least;
        out[n_out] = i;
        n_out += n_out < k && (b > least || (equal && n_equal > 0));
        n_equal -= equal;
    });
}

} // namespace
