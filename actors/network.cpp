// The policy's network on the processor: layers(GELU(x weight^T + embedding)), forwards and its gradient, in one pass.
//
// Rows go through all layers in blocks that stay in the caches, so that of the activations only what enters each GELU
// is written to memory. Every product is of one form, a start and A B, with an entry of A in all lanes and a row of B in
// vectors. That serves outputs, which start from the bias; gradients by the weights, which start from those so far; and
// gradients by what entered a layer, which are multiplied by GELU's slope.
//
// Plain C interface, no library: `native.py` calls it. It is built once for each kind of processor that is told apart
// there; a vector has as many lanes as the flags of this build allow.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int ACCUMULATORS = 12;  // of 16 registers: three more hold what is multiplied
constexpr int64_t BLOCK_ROWS = 96;
constexpr int64_t ALIGNMENT = 64;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

INLINE Floats load(const float* from) {
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store(float* to, Floats values) { memcpy(to, &values, sizeof values); }

template <int N>
struct Count {
    static constexpr int value = N;
};

INLINE int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

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
        distance[v] = (Floats)((Integers)x[v] & 0x7fffffff);
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
            Floats side = (Floats)((Integers)distance[v] | ((Integers)x[v] & INT32_MIN));
            store(slope + v * LANES, below + side * density * 0.39894228f);
        }
    }
}

// B of a product: its columns come in strips of two vectors (the last may be of one), each contiguous, row after row.
constexpr int64_t STRIP = 2 * LANES;

INLINE int64_t strip_width(int64_t column, int64_t columns) { return columns - column < STRIP ? LANES : STRIP; }

// Entry (row, column) of `from` stands at row * from_row + column * from_column; columns are padded with zeros.
void pack(int64_t rows, int64_t columns, const float* from, int64_t from_row, int64_t from_column, float* to) {
    for (int64_t first = 0; first < columns; first += STRIP) {
        const int64_t width = strip_width(first, padded(columns));
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = first; column < first + width; column++)
                *to++ = column < columns ? from[row * from_row + column * from_column] : 0.0f;
    }
}

// GELU of z [rows, columns], to rows as well or to strips, and its slope to rows.
INLINE void activate(int64_t rows, int64_t columns, const float* z, float* value) {
    int64_t i = 0;
    for (; i + STRIP <= rows * columns; i += STRIP) gelu<2, false>(z + i, value + i, nullptr);
    for (; i < rows * columns; i += LANES) gelu<1, false>(z + i, value + i, nullptr);
}

INLINE void activate_with_slope(int64_t rows, int64_t columns, const float* z, float* strips, float* slope) {
    const int64_t whole = columns / STRIP * STRIP;
    for (int64_t row = 0; row < rows; row++, z += columns, slope += columns) {
        for (int64_t first = 0; first < whole; first += STRIP)
            gelu<2, true>(z + first, strips + rows * first + row * STRIP, slope + first);
        if (whole < columns) gelu<1, true>(z + whole, strips + rows * whole + row * LANES, slope + whole);
    }
}

// A matrix: entry (m, k) stands at m * row + k * column.
struct Factors {
    const float* entries;
    int64_t row, column;
};

// What the sums of a product are added to, or multiplied by where SCALE is set; row 0 for the same in all rows.
struct Start {
    const float* entries;
    int64_t row;
};

// C [M, V vectors] = start + A [M, K] B [K, V vectors], K >= 1, in registers.
template <int M, int V, bool SCALE>
INLINE void tile(int64_t K, Factors a, const float* b, Start start, float* c, int64_t c_row) {
    Floats sums[M][V] = {};
    int64_t k = 0;
    do {
        Floats row[V];
        for (int v = 0; v < V; v++) row[v] = load(b + k * V * LANES + v * LANES);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) sums[m][v] += a.entries[m * a.row + k * a.column] * row[v];
    } while (++k < K);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) {
            Floats from = load(start.entries + m * start.row + v * LANES);
            store(c + m * c_row + v * LANES, SCALE ? from * sums[m][v] : from + sums[m][v]);
        }
}

template <int V, bool SCALE>
INLINE void strip(int64_t M, int64_t K, Factors a, const float* b, Start start, float* c, int64_t c_row) {
    int64_t m = 0;
    auto rows = [&](auto count) {
        constexpr int ROWS = decltype(count)::value;
        for (; m + ROWS <= M; m += ROWS) {
            tile<ROWS, V, SCALE>(K, a, b, start, c + m * c_row, c_row);
            a.entries += ROWS * a.row;
            start.entries += ROWS * start.row;
        }
    };
    rows(Count<ACCUMULATORS / V>());
    rows(Count<4>());
    rows(Count<2>());
    rows(Count<1>());
}

// C [M, N] = start + A [M, K] B [K, N], or start * (A B); N is a multiple of LANES, and B comes in strips.
template <bool SCALE = false>
void product(int64_t M, int64_t N, int64_t K, Factors a, const float* b, Start start, float* c, int64_t c_row) {
    for (int64_t n = 0; n < N; n += STRIP, b += STRIP * K, start.entries += STRIP)
        if (strip_width(n, N) == STRIP)
            strip<2, SCALE>(M, K, a, b, start, c + n, c_row);
        else
            strip<1, SCALE>(M, K, a, b, start, c + n, c_row);
}

}  // namespace

extern "C" {

// `layers` products from `hidden` to `hidden` and one to `outputs`, after the first from `inputs`; `hidden` is a multiple
// of the lanes. Row r is in group r / period at step r % period: its state stands at group * group_stride + step *
// step_stride, and its embedding at step * hidden.
struct Network {
    int64_t inputs, hidden, layers, outputs;
    int64_t rows, period, group_stride, step_stride;
};

}  // extern "C"

namespace {

// Where the rows of a block stand.
struct Place {
    int64_t group, step;

    Place(const Network& network, int64_t row) : group(row / network.period), step(row % network.period) {}

    const float* state(const Network& network, const float* x) const {
        return x + group * network.group_stride + step * network.step_stride;
    }

    void next(const Network& network) {
        if (++step == network.period) step = 0, group++;
    }
};

// Memory of one call.
struct Scratch {
    float* floats;

    explicit Scratch(int64_t size)
        : floats((float*)aligned_alloc(ALIGNMENT, (size * sizeof(float) / ALIGNMENT + 1) * ALIGNMENT)) {}
    ~Scratch() { free(floats); }
};

// to [width] += the rows [n, width], which are summed first: one row at a time would lose digits in a large total.
INLINE void add_rows(int64_t n, int64_t width, const float* rows, float* sums, float* to) {
    memset(sums, 0, width * sizeof(float));
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < width; i++) sums[i] += rows[r * width + i];
    for (int64_t i = 0; i < width; i++) to[i] += sums[i];
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

extern "C" {

// Raised whenever what is called or how parameters are laid out changes.
int32_t network_version() { return 3; }

int32_t network_lanes() { return LANES; }

// Parameters come as pointers to the first weight [hidden, inputs], and to the weight [its outputs, hidden] and the bias
// of each other product.
//
// `factors` of `network_factors` floats: the first weight transposed, [inputs, hidden], then the bias and the transposed
// weight of each other product, outputs padded to the lanes with zeros; weights in strips.
void network_pack(const Network* shape, const float* const* parameters, float* factors) {
    const int64_t hidden = shape->hidden;
    pack(shape->inputs, hidden, parameters[0], 1, shape->inputs, factors);
    factors += shape->inputs * hidden;
    for (int64_t layer = 0; layer <= shape->layers; layer++) {
        const int64_t columns = layer < shape->layers ? hidden : shape->outputs;
        pack(1, columns, parameters[2 * layer + 2], columns, 1, factors);
        factors += padded(columns);
        pack(hidden, columns, parameters[2 * layer + 1], 1, hidden, factors);
        factors += hidden * padded(columns);
    }
}

int64_t network_factors(const Network* shape) {
    const int64_t hidden = shape->hidden, outputs = padded(shape->outputs);
    return shape->inputs * hidden + shape->layers * (1 + hidden) * hidden + (1 + hidden) * outputs;
}

// out [rows, outputs] of the rows from `begin` to before `end`. What enters each GELU is written to `kept` [layers + 1,
// rows, hidden], unless that is null. Returns 0, or 1 where there was no memory.
int32_t network_forward(const Network* shape, int64_t begin, int64_t end, const float* x, const float* embedding,
                        const float* factors, float* kept, float* out) {
    const Network network = *shape;
    const int64_t inputs = network.inputs, hidden = network.hidden, outputs = padded(network.outputs);
    Scratch scratch(BLOCK_ROWS * (inputs + 2 * hidden + outputs));
    if (!scratch.floats) return 1;
    float* outcome = scratch.floats;
    float* value = outcome + BLOCK_ROWS * outputs;
    float* unkept = value + BLOCK_ROWS * hidden;
    float* states = unkept + BLOCK_ROWS * hidden;
    for (int64_t start = begin; start < end; start += BLOCK_ROWS) {
        const int64_t n = smaller(end - start, BLOCK_ROWS);
        float* z = kept ? kept + start * hidden : unkept;
        Place place(network, start);
        for (int64_t r = 0; r < n; r++, place.next(network)) {
            memcpy(states + r * inputs, place.state(network, x), inputs * sizeof(float));
            memcpy(z + r * hidden, embedding + place.step * hidden, hidden * sizeof(float));
        }
        const float* weight = factors;
        product(n, hidden, inputs, {states, inputs, 1}, weight, {z, hidden}, z, hidden);
        weight += inputs * hidden;
        for (int64_t layer = 0; layer <= network.layers; layer++) {
            activate(n, hidden, z, value);
            const bool last = layer == network.layers;
            const int64_t width = last ? outputs : hidden;
            z = last ? outcome : kept ? z + network.rows * hidden : unkept;
            const float* bias = weight;
            weight += width;
            product(n, width, hidden, {value, hidden, 1}, weight, {bias, 0}, z, width);
            weight += hidden * width;
        }
        for (int64_t r = 0; r < n; r++)
            memcpy(out + (start + r) * network.outputs, outcome + r * outputs, network.outputs * sizeof(float));
    }
    return 0;
}

// Gradients from `gradient` [rows, outputs] by the outputs, of the rows from `begin` to before `end`. Those by states are
// written to `by_states` [rows, inputs], unless that is null. The others are added to `by_embedding` [period, hidden] and
// `by_parameters`: the first weight's, [hidden, inputs padded to the lanes], and of each other product the bias's and the
// weight's [its outputs, hidden]. Returns 0, or 1 where there was no memory.
int32_t network_backward(const Network* shape, int64_t begin, int64_t end, const float* x,
                         const float* const* parameters, const float* kept, const float* gradient, float* by_states,
                         float* by_embedding, float* by_parameters) {
    const Network network = *shape;
    const int64_t inputs = padded(network.inputs), hidden = network.hidden, outputs = network.outputs;
    const int64_t widest = hidden > outputs ? hidden : outputs;
    const int64_t weights = hidden * inputs + (network.layers * hidden + outputs) * hidden;
    Scratch scratch(BLOCK_ROWS * (2 * inputs + hidden + 2 * widest) + widest + weights);
    if (!scratch.floats) return 1;
    float* states = scratch.floats;
    float* packed = states + BLOCK_ROWS * inputs;  // strips of GELU's values, and at the end of states
    float* above = packed + BLOCK_ROWS * (inputs + hidden);
    float* below = above + BLOCK_ROWS * widest;
    float* sums = below + BLOCK_ROWS * widest;
    float* weight = sums + widest;
    pack(hidden, network.inputs, parameters[0], network.inputs, 1, weight);
    for (int64_t layer = 0; layer <= network.layers; layer++)
        pack(layer < network.layers ? hidden : outputs, hidden, parameters[2 * layer + 1], hidden, 1,
             weight + hidden * inputs + layer * hidden * hidden);
    for (int64_t start = begin; start < end; start += BLOCK_ROWS) {
        const int64_t n = smaller(end - start, BLOCK_ROWS);
        memcpy(above, gradient + start * outputs, n * outputs * sizeof(float));
        float* by_bias = by_parameters + hidden * inputs + network.layers * (hidden + hidden * hidden);
        int64_t width = outputs;
        for (int64_t layer = network.layers; layer >= 0; layer--) {
            activate_with_slope(n, hidden, kept + (layer * network.rows + start) * hidden, packed, below);
            add_rows(n, width, above, sums, by_bias);
            float* by_weight = by_bias + width;
            product(width, hidden, n, {above, 1, width}, packed, {by_weight, hidden}, by_weight, hidden);
            const float* up = weight + hidden * inputs + layer * hidden * hidden;
            product<true>(n, hidden, width, {above, width, 1}, up, {below, hidden}, below, hidden);
            float* done = above;
            above = below;
            below = done;
            width = hidden;
            by_bias -= hidden + hidden * hidden;
        }
        Place place(network, start);
        for (int64_t r = 0; r < n; r++, place.next(network)) {
            memcpy(states + r * network.inputs, place.state(network, x), network.inputs * sizeof(float));
            float* to = by_embedding + place.step * hidden;
            if (network.period > 1)
                for (int64_t i = 0; i < hidden; i += LANES) store(to + i, load(to + i) + load(above + r * hidden + i));
        }
        if (network.period == 1) add_rows(n, hidden, above, sums, by_embedding);
        pack(n, network.inputs, states, network.inputs, 1, packed);
        product(hidden, inputs, n, {above, 1, hidden}, packed, {by_parameters, inputs}, by_parameters, inputs);
        if (by_states) {
            memset(states, 0, n * inputs * sizeof(float));
            product(n, inputs, hidden, {above, hidden, 1}, weight, {states, inputs}, states, inputs);
            for (int64_t r = 0; r < n; r++)
                memcpy(by_states + (start + r) * network.inputs, states + r * inputs, network.inputs * sizeof(float));
        }
    }
    return 0;
}

}  // extern "C"
