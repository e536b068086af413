// The policy on the processor. Its network: layers(GELU(x weight^T + embedding)), forwards and its gradient, in one pass.
//
// Rows go through all layers in blocks that stay in the caches, so that of the activations at most what enters each GELU
// is kept for all rows. Every product is of one form, a start and A B, with an entry of A in all lanes and a row of B in
// vectors. That serves outputs, which start from the bias; gradients by the weights, which start from those so far; and
// gradients by what entered a layer, which are multiplied by GELU's slope.
//
// Around it, what a policy's step is made of: what the network sees of a state, and the drift and the variance that its
// outputs give. Steps are drawn and their log densities evaluated while a block's outputs are in the caches.
//
// Plain C interface, no library: `native.py` calls it. It is built once for each kind of processor that is told apart
// there; a vector has as many lanes as the flags of this build allow.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vectors.hpp"

namespace {

constexpr int ACCUMULATORS = 12;  // of 16 registers: three more hold what is multiplied
constexpr int64_t BLOCK_ROWS = 96;
constexpr int64_t ALIGNMENT = 64;
constexpr double TWO_PI = 6.283185307179586;

template <int N>
struct Count {
    static constexpr int value = N;
};

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

// GELU of z [rows, columns], to rows as well or to strips (or both), and its slope to rows.
INLINE void activate(int64_t rows, int64_t columns, const float* z, float* value) {
    int64_t i = 0;
    for (; i + STRIP <= rows * columns; i += STRIP) gelu<2, false>(z + i, value + i, nullptr);
    for (; i < rows * columns; i += LANES) gelu<1, false>(z + i, value + i, nullptr);
}

template <bool ROWS = false>
INLINE void activate_with_slope(int64_t rows, int64_t columns, const float* z, float* strips, float* slope,
                                float* value = nullptr) {
    const int64_t whole = columns / STRIP * STRIP;
    for (int64_t row = 0; row < rows; row++, z += columns, slope += columns, value += ROWS ? columns : 0) {
        for (int64_t first = 0; first < whole; first += STRIP) {
            float* to = strips + rows * first + row * STRIP;
            gelu<2, true>(z + first, to, slope + first);
            if (ROWS) memcpy(value + first, to, STRIP * sizeof(float));
        }
        if (whole < columns) {
            float* to = strips + rows * whole + row * LANES;
            gelu<1, true>(z + whole, to, slope + whole);
            if (ROWS) memcpy(value + whole, to, LANES * sizeof(float));
        }
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
// step_stride, and its embedding at step * hidden. With `width` > 0 the network sees width * +-log(1 + |x| / width).
struct Network {
    int64_t inputs, hidden, layers, outputs;
    int64_t rows, period, group_stride, step_stride;
    float width;
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

// +-log(1 + |x| / reach).
INLINE Floats compressed(Floats x, Floats reach) { return with_sign_of(x, log_of_one_plus(magnitude(x) / reach)); }

// What the network sees of the states of n rows, to [n, inputs].
void gather(const Network& network, Place place, int64_t n, const float* x, float* states) {
    const int64_t inputs = network.inputs;
    for (int64_t r = 0; r < n; r++, place.next(network))
        memcpy(states + r * inputs, place.state(network, x), inputs * sizeof(float));
    if (network.width > 0.0f)  // a block has a multiple of the lanes of rows, so that there is room for whole vectors
        for (int64_t i = 0; i < n * inputs; i += LANES)
            store(states + i, compressed(load(states + i), network.width - Floats{}) * network.width);
}

// Memory for `evaluate` with blocks of up to `most` rows.
INLINE int64_t block_size(const Network& network, int64_t most) {
    return padded(most) * (network.inputs + 2 * network.hidden + padded(network.outputs));
}

// What GELU gives at one layer of a block: values [n, hidden] in strips, and slopes [n, hidden].
struct Activations {
    const float *strips, *slope;
};

// Memory for the activations of all layers of a block of up to `most` rows.
struct Kept {
    int64_t layer;
    float* floats;

    static int64_t size(const Network& network, int64_t most) { return 2 * (network.layers + 1) * most * network.hidden; }

    Kept(const Network& network, int64_t most, float* floats) : layer(most * network.hidden), floats(floats) {}

    float* strips(int64_t number) const { return floats + 2 * number * layer; }
    float* slope(int64_t number) const { return strips(number) + layer; }
};

// The outputs of n rows from `start`, [n, padded outputs] in `block`, which is for blocks of up to `most`. What enters
// each GELU is written to `entering`, and what it gives to `kept`, unless they are null.
float* evaluate(const Network& network, int64_t start, int64_t n, const float* x, const float* embedding,
                const float* factors, float* entering, const Kept* kept, int64_t most, float* block) {
    const int64_t inputs = network.inputs, hidden = network.hidden, outputs = padded(network.outputs);
    float* outcome = block;
    float* value = outcome + padded(most) * outputs;
    float* passing = value + padded(most) * hidden;
    float* states = passing + padded(most) * hidden;
    float* z = entering ? entering + start * hidden : passing;
    Place place(network, start);
    gather(network, place, n, x, states);
    for (int64_t r = 0; r < n; r++, place.next(network))
        memcpy(z + r * hidden, embedding + place.step * hidden, hidden * sizeof(float));
    product(n, hidden, inputs, {states, inputs, 1}, factors, {z, hidden}, z, hidden);
    factors += inputs * hidden;
    for (int64_t layer = 0; layer <= network.layers; layer++) {
        if (kept)
            activate_with_slope<true>(n, hidden, z, kept->strips(layer), kept->slope(layer), value);
        else
            activate(n, hidden, z, value);
        const bool last = layer == network.layers;
        const int64_t width = last ? outputs : hidden;
        z = last ? outcome : entering ? z + network.rows * hidden : passing;
        const float* bias = factors;
        factors += width;
        product(n, width, hidden, {value, hidden, 1}, factors, {bias, 0}, z, width);
        factors += hidden * width;
    }
    return outcome;
}

// The way back through the network, a block of up to `most` rows at a time.
struct Backward {
    const Network& network;
    const int64_t inputs, widest;
    float *above, *below, *states, *packed, *sums, *weight;

    static int64_t size(const Network& network, int64_t most) {
        const int64_t inputs = padded(network.inputs), hidden = network.hidden, outputs = network.outputs;
        const int64_t widest = hidden > outputs ? hidden : outputs;
        const int64_t weights = hidden * inputs + (network.layers * hidden + outputs) * hidden;
        return padded(2 * most * (widest + inputs) + widest + weights);
    }

    Backward(const Network& network, const float* const* parameters, int64_t most, float* memory)
        : network(network),
          inputs(padded(network.inputs)),
          widest(network.hidden > network.outputs ? network.hidden : network.outputs),
          above(memory),
          below(above + most * widest),
          states(below + most * widest),
          packed(states + most * inputs),
          sums(packed + most * inputs),
          weight(sums + widest) {
        const int64_t hidden = network.hidden;
        pack(hidden, network.inputs, parameters[0], network.inputs, 1, weight);
        for (int64_t layer = 0; layer <= network.layers; layer++)
            pack(layer < network.layers ? hidden : network.outputs, hidden, parameters[2 * layer + 1], hidden, 1,
                 weight + hidden * inputs + layer * hidden * hidden);
    }

    // Gradients from that by the outputs of n rows from `start`, [n, outputs] in `above`; see `network_backward`.
    // `activations(layer)` are the block's, asked for from the last layer to the first.
    template <typename Source>
    void block(int64_t start, int64_t n, const float* x, Source activations, float* by_states, float* by_embedding,
               float* by_parameters) const {
        const int64_t hidden = network.hidden;
        float *from = above, *to = below;
        float* by_bias = by_parameters + hidden * inputs + network.layers * (hidden + hidden * hidden);
        int64_t width = network.outputs;
        for (int64_t layer = network.layers; layer >= 0; layer--) {
            const Activations gelu = activations(layer);
            add_rows(n, width, from, sums, by_bias);
            float* by_weight = by_bias + width;
            product(width, hidden, n, {from, 1, width}, gelu.strips, {by_weight, hidden}, by_weight, hidden);
            const float* up = weight + hidden * inputs + layer * hidden * hidden;
            product<true>(n, hidden, width, {from, width, 1}, up, {gelu.slope, hidden}, to, hidden);
            float* done = from;
            from = to;
            to = done;
            width = hidden;
            by_bias -= hidden + hidden * hidden;
        }
        Place place(network, start);
        gather(network, place, n, x, states);
        for (int64_t r = 0; r < n; r++, place.next(network)) {
            float* by = by_embedding + place.step * hidden;
            if (network.period > 1)
                for (int64_t i = 0; i < hidden; i += LANES) store(by + i, load(by + i) + load(from + r * hidden + i));
        }
        if (network.period == 1) add_rows(n, hidden, from, sums, by_embedding);
        pack(n, network.inputs, states, network.inputs, 1, packed);
        product(hidden, inputs, n, {from, 1, hidden}, packed, {by_parameters, inputs}, by_parameters, inputs);
        if (by_states) {
            memset(states, 0, n * inputs * sizeof(float));
            product(n, inputs, hidden, {from, hidden, 1}, weight, {states, inputs}, states, inputs);
            for (int64_t r = 0; r < n; r++)
                memcpy(by_states + (start + r) * network.inputs, states + r * inputs, network.inputs * sizeof(float));
        }
    }
};

}  // namespace

extern "C" {

// Raised whenever what is called or how parameters are laid out changes.
int32_t network_version() { return 8; }

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
    Scratch scratch(block_size(network, BLOCK_ROWS));
    if (!scratch.floats) return 1;
    for (int64_t start = begin; start < end; start += BLOCK_ROWS) {
        const int64_t n = smaller(end - start, BLOCK_ROWS);
        const float* outcome =
            evaluate(network, start, n, x, embedding, factors, kept, nullptr, BLOCK_ROWS, scratch.floats);
        for (int64_t r = 0; r < n; r++)
            memcpy(out + (start + r) * network.outputs, outcome + r * padded(network.outputs),
                   network.outputs * sizeof(float));
    }
    return 0;
}

// Gradients from `gradient` [rows, outputs] by the outputs, of the rows from `begin` to before `end`, each row multiplied
// by its number in `factors` [rows], unless that is null. Those by states (for `width` 0 only) are written to `by_states`
// [rows, inputs], unless that is null. The others are added to `by_embedding` [period, hidden] and
// `by_parameters`: the first weight's, [hidden, inputs padded to the lanes], and of each other product the bias's and the
// weight's [its outputs, hidden]. Returns 0, or 1 where there was no memory.
int32_t network_backward(const Network* shape, int64_t begin, int64_t end, const float* x,
                         const float* const* parameters, const float* kept, const float* gradient,
                         const float* factors, float* by_states, float* by_embedding, float* by_parameters) {
    const Network network = *shape;
    const int64_t hidden = network.hidden, outputs = network.outputs;
    Scratch scratch(Backward::size(network, BLOCK_ROWS) + BLOCK_ROWS * (hidden + padded(hidden)));
    if (!scratch.floats) return 1;
    const Backward backward(network, parameters, BLOCK_ROWS, scratch.floats);
    float* slope = scratch.floats + Backward::size(network, BLOCK_ROWS);
    float* strips = slope + BLOCK_ROWS * hidden;
    for (int64_t start = begin; start < end; start += BLOCK_ROWS) {
        const int64_t n = smaller(end - start, BLOCK_ROWS);
        memcpy(backward.above, gradient + start * outputs, n * outputs * sizeof(float));
        if (factors)
            for (int64_t r = 0; r < n; r++)
                for (int64_t i = 0; i < outputs; i++) backward.above[r * outputs + i] *= factors[start + r];
        auto activations = [&](int64_t layer) {
            activate_with_slope(n, hidden, kept + (layer * network.rows + start) * hidden, strips, slope);
            return Activations{strips, slope};
        };
        backward.block(start, n, x, activations, by_states, by_embedding, by_parameters);
    }
    return 0;
}

// A network of times: its inputs are sin and cos of angles t f + p, [rows, 2 harmonics], and its embedding one bias.
// `features` are written, [rows, inputs]; the rest as for the network, of all rows.
int32_t times_forward(const Network* shape, const float* times, const float* frequencies, const float* phases,
                      const float* bias, const float* factors, float* features, float* kept, float* out) {
    const int64_t harmonics = shape->inputs / 2;
    for (int64_t row = 0; row < shape->rows; row++)
        for (int64_t h = 0; h < harmonics; h++) {
            float angle = times[row] * frequencies[h];
            asm volatile("" : "+m"(angle));  // rounded before the sum, as elsewhere: it may be a hundred
            angle += phases[h];
            features[row * 2 * harmonics + h] = __builtin_sinf(angle);
            features[row * 2 * harmonics + harmonics + h] = __builtin_cosf(angle);
        }
    return network_forward(shape, 0, shape->rows, features, bias, factors, kept, out);
}

// Gradients from `gradient` [rows, outputs]: by the features, which are scratch, by the phases [harmonics], which are
// written, and as for the network.
int32_t times_backward(const Network* shape, const float* features, const float* const* parameters, const float* kept,
                       const float* gradient, float* by_features, float* by_phases, float* by_bias,
                       float* by_parameters) {
    const int64_t harmonics = shape->inputs / 2;
    if (network_backward(shape, 0, shape->rows, features, parameters, kept, gradient, nullptr, by_features, by_bias,
                         by_parameters))
        return 1;
    for (int64_t h = 0; h < harmonics; h++) {
        double sum = 0.0;
        for (int64_t row = 0; row < shape->rows; row++) {
            const float *at = features + row * 2 * harmonics + h, *by = by_features + row * 2 * harmonics + h;
            sum += by[0] * at[harmonics] - by[harmonics] * at[0];
        }
        by_phases[h] = (float)sum;
    }
    return 0;
}

// How a network's outputs move a state: `inputs` offsets of the drift, as many pulls if `pulls`, and as many numbers that
// give the log variance if `variances`. The drift gains the score, times none, one or `inputs` numbers (`scales`).
struct Head {
    int64_t pulls, variances, scales;
    float pull, score_clip, drift_clip, log_var_range;
};

// The numbers of one step (see `NoiseUnits` for the first two, and the processes for the others).
struct Step {
    float reach, rate, keep, gain, variance, back, back_variance, extra;
};

}  // extern "C"

namespace {

constexpr int64_t CHUNK = 512;  // entries, which fit the first cache

enum Array { X, NEXT, SCORE, SCALE, OFFSET, PULL, RAW, REACH, RATE, KEEP, GAIN, VARIANCE, BACK, EXTRA, ARRAYS };

// Some rows of a block, entry after entry, as vectors know no rows.
struct Chunk {
    int64_t dim, most, size;
    float* arrays;

    static int64_t rows(int64_t dim) { return dim < CHUNK ? CHUNK / dim : 1; }
    static int64_t room(int64_t dim) { return padded(rows(dim) * dim); }
    static int64_t arrays_size(int64_t dim) { return ARRAYS * room(dim); }

    Chunk(int64_t dim, float* arrays) : dim(dim), most(rows(dim)), size(room(dim)), arrays(arrays) {
        memset(arrays, 0, arrays_size(dim) * sizeof(float));
    }

    float* operator[](int array) const { return arrays + array * size; }
};

// What steps are made of, at the rows of one call.
struct Rows {
    const Network& network;
    const Head& head;
    const Step* steps;    // [period]
    const float* x;       // as the network's
    const float* next;    // as x: the states after the steps
    const float* scores;  // [rows, inputs], where there are scales
    const float* scale;   // [period, scales]
};

// n rows from row `start`, whose outputs are `outcome` [n, padded outputs].
void fill(const Rows& rows, int64_t start, int64_t n, const float* outcome, const Chunk& chunk) {
    const int64_t dim = chunk.dim, scales = rows.head.scales;
    Place place(rows.network, start);
    for (int64_t r = 0; r < n; r++, place.next(rows.network), outcome += padded(rows.network.outputs)) {
        const Step& step = rows.steps[place.step];
        const float* x = place.state(rows.network, rows.x);
        for (int64_t d = 0, i = r * dim; d < dim; d++, i++) {
            chunk[X][i] = x[d];
            chunk[OFFSET][i] = outcome[d];
            chunk[KEEP][i] = step.keep;
            chunk[GAIN][i] = step.gain;
            chunk[VARIANCE][i] = step.variance;
        }
        if (rows.next)
            for (int64_t d = 0, i = r * dim; d < dim; d++, i++) {
                chunk[NEXT][i] = place.state(rows.network, rows.next)[d];
                chunk[BACK][i] = step.back;
            }
        else
            for (int64_t d = 0, i = r * dim; d < dim; d++, i++) chunk[EXTRA][i] = step.extra;
        if (rows.head.pulls)
            for (int64_t d = 0, i = r * dim; d < dim; d++, i++) {
                chunk[PULL][i] = outcome[dim + d];
                chunk[REACH][i] = step.reach;
                chunk[RATE][i] = step.rate;
            }
        if (rows.head.variances)
            for (int64_t d = 0, i = r * dim; d < dim; d++, i++)
                chunk[RAW][i] = outcome[(1 + rows.head.pulls) * dim + d];
        if (scales)
            for (int64_t d = 0, i = r * dim; d < dim; d++, i++) {
                chunk[SCORE][i] = rows.scores[(start + r) * dim + d];
                chunk[SCALE][i] = rows.scale[place.step * scales + (scales > 1 ? d : 0)];
            }
    }
}

// Drift and log variance of a vector of entries, and what their gradients by the outputs need.
struct Motion {
    Floats drift, measured, log_var, slope;
    Integers passes;  // where the drift is not clipped
};

INLINE Motion motion(const Head& head, const Chunk& chunk, int64_t i) {
    Motion found{};
    Floats drift = load(chunk[OFFSET] + i);
    if (head.pulls) {
        found.measured = head.pull * compressed(load(chunk[X] + i), load(chunk[REACH] + i));
        drift = (drift + load(chunk[PULL] + i) * found.measured) * load(chunk[RATE] + i);
    }
    if (head.scales) drift += load(chunk[SCALE] + i) * within(load(chunk[SCORE] + i), head.score_clip);
    found.passes = (drift > -head.drift_clip) & (drift < head.drift_clip);
    found.drift = within(drift, head.drift_clip);
    if (head.variances) {
        found.log_var = head.log_var_range * hyperbolic_tangent(load(chunk[RAW] + i), found.slope);
        found.slope *= head.log_var_range;
    }
    return found;
}

// The sum of each of n rows.
void sum_rows(int64_t n, int64_t dim, const float* entries, float* sums) {
    for (int64_t r = 0; r < n; r++, entries += dim) {
        Floats lanes = {};
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) lanes += load(entries + d);
        float sum = 0.0f;
        for (; d < dim; d++) sum += entries[d];
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
        sums[r] = sum;
    }
}

// Work on every chunk of the n rows from `start`, whose outputs are `outcome` [n, padded outputs].
template <typename Work>
void in_chunks(const Rows& rows, int64_t start, int64_t n, const float* outcome, const Chunk& chunk, Work work) {
    for (int64_t r = 0; r < n; r += chunk.most) {
        const int64_t some = smaller(n - r, chunk.most);
        fill(rows, start + r, some, outcome + r * padded(rows.network.outputs), chunk);
        work(chunk, start + r, some);
    }
}

// The same on all blocks between `begin` and `end`; false where there was no memory.
template <typename Work>
bool in_blocks(const Rows& rows, int64_t begin, int64_t end, const float* embedding, const float* factors,
               float* entering, Work work) {
    const Network& network = rows.network;
    const int64_t size = block_size(network, BLOCK_ROWS);
    Scratch scratch(size + Chunk::arrays_size(network.inputs));
    if (!scratch.floats) return false;
    const Chunk chunk(network.inputs, scratch.floats + size);
    for (int64_t start = begin; start < end; start += BLOCK_ROWS) {
        const int64_t n = smaller(end - start, BLOCK_ROWS);
        const float* outcome =
            evaluate(network, start, n, rows.x, embedding, factors, entering, nullptr, BLOCK_ROWS, scratch.floats);
        in_chunks(rows, start, n, outcome, chunk, work);
    }
    return true;
}

// Energies and squares of the way back of a chunk's n rows, [n] each, and the energies' gradient by the outputs
// [n, outputs] unless that is null; the chunk's entries are overwritten.
void energies(const Head& head, const Chunk& chunk, int64_t n, float* energy, float* back, float* by_outputs) {
    const int64_t dim = chunk.dim;
    for (int64_t i = 0; i < n * dim; i += LANES) {
        const Motion move = motion(head, chunk, i);
        const Floats from = load(chunk[X] + i), to = load(chunk[NEXT] + i), gain = load(chunk[GAIN] + i);
        const Floats residual = to - load(chunk[KEEP] + i) * from - gain * move.drift;
        Floats precision = 1.0f / load(chunk[VARIANCE] + i);
        if (head.variances) precision *= exponential(-move.log_var);
        const Floats square = residual * residual * precision;
        const Floats way_back = from - load(chunk[BACK] + i) * to;
        store(chunk[NEXT] + i, square + move.log_var);
        store(chunk[BACK] + i, way_back * way_back);
        Floats by_drift = -2.0f * gain * residual * precision;
        by_drift = move.passes ? by_drift : Floats{};
        if (head.pulls) {
            by_drift *= load(chunk[RATE] + i);
            store(chunk[PULL] + i, by_drift * move.measured);
        }
        store(chunk[OFFSET] + i, by_drift);
        if (head.variances) store(chunk[RAW] + i, (1.0f - square) * move.slope);
    }
    sum_rows(n, dim, chunk[NEXT], energy);
    sum_rows(n, dim, chunk[BACK], back);
    if (!by_outputs) return;
    for (int64_t r = 0; r < n; r++) {
        const int64_t first = r * dim;
        for (int64_t d = 0; d < dim; d++) *by_outputs++ = chunk[OFFSET][first + d];
        for (int64_t d = 0; head.pulls && d < dim; d++) *by_outputs++ = chunk[PULL][first + d];
        for (int64_t d = 0; head.variances && d < dim; d++) *by_outputs++ = chunk[RAW][first + d];
    }
}

// by_scale [period, scales] += the gradient by the score's factors, from that by the outputs of n rows from `start`,
// each row of it times its number in `factors` [n], unless that is null.
void add_by_scale(const Rows& rows, int64_t start, int64_t n, const float* by_outputs, const float* factors,
                  double* by_scale) {
    const Head& head = rows.head;
    const int64_t dim = rows.network.inputs, scales = head.scales;
    Place place(rows.network, start);
    for (int64_t r = 0; r < n; r++, place.next(rows.network)) {
        // Outputs of a policy that measures by the noise are multiplied by the rate on their way to the drift.
        const float rate = head.pulls ? rows.steps[place.step].rate : 1.0f;
        const float factor = (factors ? factors[r] : 1.0f) / rate;
        const float *score = rows.scores + (start + r) * dim, *by = by_outputs + r * rows.network.outputs;
        double* to = by_scale + place.step * scales;
        for (int64_t d = 0; d < dim; d++) {
            const float clip = head.score_clip, high = score[d] > clip ? clip : score[d];
            to[scales > 1 ? d : 0] += factor * by[d] * (high < -clip ? -clip : high);
        }
    }
}

}  // namespace

extern "C" {

// Of every row from `begin` to before `end`: `energy`, the sum over dimensions of (next - keep x - gain u)^2 / (variance
// e^v) + v with the policy's drift u and log variance v, its gradient by the outputs to `by_outputs` [rows, outputs]
// unless that is null, and `back`, the sum of (x - back next)^2. `kept` as for the network. Returns as that.
int32_t policy_energy(const Network* shape, const Head* how, int64_t begin, int64_t end, const Step* steps,
                      const float* x, const float* next, const float* scores, const float* scale,
                      const float* embedding, const float* factors, float* kept, float* by_outputs, float* energy,
                      float* back) {
    const Rows rows{*shape, *how, steps, x, next, scores, scale};
    const Head head = *how;
    return !in_blocks(rows, begin, end, embedding, factors, kept, [&](const Chunk& chunk, int64_t start, int64_t n) {
        float* by = by_outputs ? by_outputs + start * shape->outputs : nullptr;
        energies(head, chunk, n, energy + start, back + start, by);
    });
}

// by_scale [period, scales] += the energies' gradient by the score's factors, from that by the outputs, each row of it
// times its number in `factors` [rows].
void policy_by_scale(const Network* shape, const Head* how, int64_t begin, int64_t end, const Step* steps,
                     const float* scores, const float* by_outputs, const float* factors, double* by_scale) {
    if (begin >= end) return;
    const Rows rows{*shape, *how, steps, nullptr, nullptr, scores, nullptr};
    add_by_scale(rows, begin, end - begin, by_outputs + begin * shape->outputs, factors + begin, by_scale);
}

// Trajectory balance, there and back a few trajectories at a time, whose activations stay in the caches. A group of
// `period` rows is a trajectory; of those from `begin` to before `end`
//
//     residual = offset + sum over the steps of log P_B - log P_F,
//
// which are -1/2 of `energy` and of `back` / back_variance of `policy_energy`, and of dim log(2 pi variance) of either
// kernel; a step back that is certain has log P_B = 0. Gradients of the sum of weight * residual^2 are added: by the
// score's factors to `by_scale` [period, scales], and as those of the network. `parameters` and the other arguments are
// as there. Returns as the network.
int32_t policy_balance(const Network* shape, const Head* how, int64_t begin, int64_t end, const Step* steps,
                       const float* x, const float* next, const float* scores, const float* scale,
                       const float* embedding, const float* factors, const float* const* parameters,
                       const float* offset, float weight, float* residual, double* by_scale, float* by_embedding,
                       float* by_parameters) {
    const Network network = *shape;
    const Head head = *how;
    const Rows rows{network, head, steps, x, next, scores, scale};
    const int64_t period = network.period, outputs = network.outputs;
    const int64_t together = period < BLOCK_ROWS ? BLOCK_ROWS / period : 1, most = together * period;
    const int64_t sizes[] = {block_size(network, most), Kept::size(network, most), Backward::size(network, most),
                             Chunk::arrays_size(network.inputs), 2 * padded(most)};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    Scratch scratch(total);
    if (!scratch.floats) return 1;
    float* block = scratch.floats;
    const Kept kept(network, most, block + sizes[0]);
    const Backward backward(network, parameters, most, kept.floats + sizes[1]);
    const Chunk chunk(network.inputs, backward.above + sizes[2]);
    float *energy = chunk.arrays + sizes[3], *back = energy + padded(most);
    auto activations = [&](int64_t layer) { return Activations{kept.strips(layer), kept.slope(layer)}; };
    double constant = 0.0;
    for (const Step* step = steps; step < steps + period; step++) {
        const double there = log(TWO_PI * step->variance), back = log(TWO_PI * step->back_variance);
        constant += network.inputs * (step->back_variance == 0.0f ? there : there - back);
    }
    for (int64_t group = begin; group < end; group += together) {
        const int64_t groups = smaller(end - group, together), start = group * period, n = groups * period;
        const float* outcome = evaluate(network, start, n, x, embedding, factors, nullptr, &kept, most, block);
        float* by_outputs = backward.above;
        in_chunks(rows, start, n, outcome, chunk, [&](const Chunk& chunk, int64_t first, int64_t some) {
            const int64_t r = first - start;
            energies(head, chunk, some, energy + r, back + r, by_outputs + r * outputs);
        });
        for (int64_t r = 0, g = group; g < group + groups; g++) {
            double sum = constant;
            for (const Step* step = steps; step < steps + period; step++, r++)
                sum += energy[r] - (step->back_variance == 0.0f ? 0.0f : back[r] / step->back_variance);
            residual[g] = (float)(offset[g] + 0.5 * sum);
            for (int64_t i = (r - period) * outputs; i < r * outputs; i++) by_outputs[i] *= weight * residual[g];
        }
        if (head.scales) add_by_scale(rows, start, n, by_outputs, nullptr, by_scale);
        backward.block(start, n, x, activations, nullptr, by_embedding, by_parameters);
    }
    return 0;
}

// Where rows of [rows, numbers, inputs] stand.
struct Table {
    float* entries;
    int64_t row, number;

    float* at(int64_t r, int64_t n) const { return entries + r * row + n * number; }
};

// The steps of a grid, each of all rows of the network at once (`period` 1): `steps`, `scale` [steps, scales] and
// `embedding` [steps, hidden] are theirs. What is drawn goes to `states`, which begin with those before the first
// step, and the scores on the way to `scores`, unless it has no entries.
struct Rollout {
    Network network;
    Head head;
    const Step* steps;
    const float *scale, *embedding, *factors;
    Table states, scores;
};

// Step `number` of every row from `begin` to before `end`: keep x + gain u + sqrt(variance e^v + extra) noise, also to
// `to`; that, x, scores and noise are [rows, inputs]. Returns as the network.
int32_t policy_step(const Rollout* rollout, int64_t number, int64_t begin, int64_t end, const float* x,
                    const float* scores, const float* noise, float* to) {
    const Network network = rollout->network;
    const Head head = rollout->head;
    const Table states = rollout->states, seen = rollout->scores;
    const float* embedding = rollout->embedding + number * network.hidden;
    const float* scale = head.scales ? rollout->scale + number * head.scales : nullptr;
    const Rows rows{network, head, rollout->steps + number, x, nullptr, scores, scale};
    const int64_t dim = network.inputs;
    auto draw = [&](const Chunk& chunk, int64_t start, int64_t n) {
        memcpy(chunk[NEXT], noise + start * dim, n * dim * sizeof(float));
        for (int64_t i = 0; i < n * dim; i += LANES) {
            const Motion move = motion(head, chunk, i);
            Floats variance = load(chunk[VARIANCE] + i);
            if (head.variances) variance *= exponential(move.log_var);
            const Floats mean = load(chunk[KEEP] + i) * load(chunk[X] + i) + load(chunk[GAIN] + i) * move.drift;
            store(chunk[NEXT] + i, mean + square_root(variance + load(chunk[EXTRA] + i)) * load(chunk[NEXT] + i));
        }
        memcpy(to + start * dim, chunk[NEXT], n * dim * sizeof(float));
        for (int64_t r = 0; r < n; r++)
            memcpy(states.at(start + r, number + 1), chunk[NEXT] + r * dim, dim * sizeof(float));
        for (int64_t r = 0; seen.entries && r < n; r++)
            memcpy(seen.at(start + r, number), scores + (start + r) * dim, dim * sizeof(float));
    };
    return !in_blocks(rows, begin, end, embedding, rollout->factors, nullptr, draw);
}

}  // extern "C"
