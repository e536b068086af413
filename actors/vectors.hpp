// Vectors of floats, as many lanes as the flags of a build allow, and functions of them.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

INLINE Floats load(const float* from) {
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }

INLINE int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

INLINE Floats magnitude(Floats x) { return (Floats)((Integers)x & 0x7fffffff); }

INLINE Floats with_sign_of(Floats x, Floats magnitude) {
    return (Floats)((Integers)magnitude | ((Integers)x & INT32_MIN));
}

// What is not a number stays so.
INLINE Floats within(Floats x, float limit) {
    x = x > limit ? limit - Floats{} : x;
    return x < -limit ? -limit - Floats{} : x;
}

// 2^f for |f| <= 1/2, and P of GELU's tail: coefficients of the highest power first.
constexpr float POWER_OF_TWO[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                                  5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f};
constexpr float TAIL[] = {0.02472066f, -0.09359558f, 0.09243165f, -0.00645179f, 0.07277606f,
                          0.08363056f, 0.10308469f,  0.1116998f,  0.11170386f};

// The polynomial with these coefficients at `at`, of V vectors side by side.
template <int V, int TERMS>
INLINE void polynomial(const float (&coefficients)[TERMS], const Floats (&at)[V], Floats (&sum)[V]) {
    for (int v = 0; v < V; v++) sum[v] = at[v] * coefficients[0] + coefficients[1];
    for (int term = 2; term < TERMS; term++)
        for (int v = 0; v < V; v++) sum[v] = sum[v] * at[v] + coefficients[term];
}

// value = GELU(z) = z Phi(z), and its slope Phi(z) + z phi(z), of V vectors side by side.
//
// Phi(-a) = exp(-a^2/2) t P(t), t = 1/(1 + p a), with P fitted to Mills' ratio for the least relative error, 2e-7 (after
// Hastings 1955, who fitted the error function). Beyond twelve deviations, where less than 1e-31 is left, the tail stays
// what it is there. What is not a number stays so.
template <int V, bool SLOPE>
INLINE void gelu(const float* z, float* value, float* slope) {
    Floats x[V], distance[V], t[V], fraction[V], whole[V], power[V], tail[V];
    for (int v = 0; v < V; v++) {
        x[v] = load(z + v * LANES);
        distance[v] = magnitude(x[v]);
        distance[v] = distance[v] > 12.0f ? 12.0f - Floats{} : distance[v];
        t[v] = 1.0f / (1.0f + 0.28f * distance[v]);
        // exp(-a^2/2) = 2^(whole + fraction): a sum with 1.5 * 2^23 has the whole part in its lowest bits.
        fraction[v] = distance[v] * distance[v] * -0.72134752f;
        whole[v] = fraction[v] + 12582912.0f;
        fraction[v] -= whole[v] - 12582912.0f;
    }
    polynomial(POWER_OF_TWO, fraction, power);
    polynomial(TAIL, t, tail);
    for (int v = 0; v < V; v++) {
        Floats density = (Floats)((Integers)power[v] + ((Integers)whole[v] << 23));
        tail[v] *= t[v] * density;
        store(value + v * LANES, (x[v] < 0.0f ? Floats{} : x[v]) - distance[v] * tail[v]);
        if (SLOPE) {
            Floats below = x[v] < 0.0f ? tail[v] : 1.0f - tail[v];
            store(slope + v * LANES, below + with_sign_of(x[v], distance[v]) * density * 0.39894228f);
        }
    }
}

// e^x, to 2e-7 of itself; beyond the normal numbers it stays what it is at their ends.
INLINE Floats exponential(Floats x) {
    Floats at[1] = {within(x, 87.0f)}, power[1];
    const Floats whole = at[0] * 1.44269504f + 12582912.0f, n = whole - 12582912.0f;
    // ln 2 in two parts (Cody and Waite), of which the first has few digits, so that its product is exact.
    at[0] = ((at[0] - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f;
    polynomial(POWER_OF_TWO, at, power);
    const Floats value = (Floats)((Integers)power[0] + ((Integers)whole << 23));
    return x == x ? value : x;
}

// tanh x, to 2e-7, and its slope 1 - tanh^2 x, to 5e-7 of itself.
INLINE Floats hyperbolic_tangent(Floats x, Floats& slope) {
    const Floats decay = exponential(-2.0f * magnitude(x)), share = 1.0f / (1.0f + decay);
    slope = 4.0f * decay * share * share;
    return with_sign_of(x, (1.0f - decay) * share);
}

// log(1 + x) of finite x >= 0, to 3e-7 of itself.
INLINE Floats log_of_one_plus(Floats x) {
    constexpr float SERIES[] = {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3};
    constexpr int32_t ROOT_OF_HALF = 0x3f3504f3;
    const Floats sum = 1.0f + x, lost = x - (sum - 1.0f);
    // sum = 2^e m with m between the roots of 1/2 and 2, and log m = 2 artanh s.
    const Integers bits = (Integers)sum - ROOT_OF_HALF;
    const Floats e = __builtin_convertvector(bits >> 23, Floats);
    const Floats m = (Floats)((bits & 0x007fffff) + ROOT_OF_HALF);
    const Floats s = (m - 1.0f) / (m + 1.0f);
    Floats squared[1] = {s * s}, series[1];
    polynomial(SERIES, squared, series);
    const Floats of_m = 2.0f * s + s * squared[0] * series[0];
    return e * 0.693359375f + ((of_m + lost / sum) - e * 2.12194440e-4f);
}

INLINE Floats square_root(Floats x) {
    for (int lane = 0; lane < LANES; lane++) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
}

}  // namespace
