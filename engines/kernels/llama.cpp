// Decoder layers of a Llama for few tokens: everything between two of torch's calls in one parallel region.
// Between its parts values are rounded to the model's dtype wherever torch's own layers round them.
// The structs are mirrored in engines/kernels/library.py.

#include <omp.h>

#include <vector>

#include "attention.h"
#include "linear.h"

namespace sluice {

// One matrix, in T or in int8 with a scale for each row; `bias` may be null.
template <class T, class B> struct Matrix {
    const B* weight;
    const float* scale;
    const T* bias;

    float result(int n, float sum) const {
        if (scale) sum *= scale[n];
        return bias ? sum + to_float(bias[n]) : sum;
    }

    Matrix from(int64_t row, int num_k) const {
        return {weight + row * num_k, scale ? scale + row : nullptr, bias ? bias + row : nullptr};
    }
};

template <class T, class B> struct Layer {
    const T *attention_norm, *mlp_norm;
    Matrix<T, B> qkv, output, gate_up, down;
    T* cache;
};

template <class T, class B> struct Model {
    const Layer<T, B>* layers;
    const T *cos, *sin;  // [positions, head_dim], the sign of the rotation in sin
    int32_t hidden, num_heads, num_kv_heads, head_dim, intermediate, block_size;
    float eps, scale;
};

struct Step {
    const int64_t *positions, *slots;  // [num_tokens]
    const int32_t* sequences;          // [num_tokens], rows of `tables`
    const int32_t* tables;             // [., table_width]
    int32_t num_tokens, table_width, max_context, num_threads;
};

// What the threads hand to each other.
template <class T> struct Shared {
    std::vector<T> qkv, attended, gate_up, activated;
};

constexpr int UNIT = 4 * N_TILE;  // columns of a result that one thread takes at least: a cache line of it or two

template <class T> void make_room(std::vector<T>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
}

// What one thread has for itself.
struct Scratch {
    std::vector<float> x, sums, scores;
};

// Of the parts of `count`, in whole units, of which each thread takes several.
inline int part_size(int count, int unit, int threads) {
    int units = (count + unit - 1) / unit, parts = 8 * threads;
    return (units + parts - 1) / parts * unit;
}

// `work` on the parts of `count`, in whole units: by all threads of the region, who wait for each other at the end. The
// parts are taken in turn, so that one whose core another program uses for a while leaves more of them to the others.
template <class F> void share_out(int count, int unit, int threads, F work) {
    int size = part_size(count, unit, threads);
#pragma omp for schedule(dynamic)
    for (int begin = 0; begin < count; begin += size) work(Range{begin, std::min(count, begin + size)});
}

// Every row of hidden [rows, size] over its root mean square, times weight, into x as `linear` wants it.
template <class T, class B>
void normed(const T* hidden, const T* weight, int num_rows, int size, float eps, float* x) {
    for (int row = 0; row < num_rows; row++) {
        const T* from = hidden + int64_t(row) * size;
        float* to = x + int64_t(row) * size;
        take_row<T, B>(from, size, to);
        vfloat squares = {};
        for (int i = 0; i < size; i += W) squares += load(to + i) * load(to + i);
        vfloat factor = splat(1.0f / std::sqrt(sum(squares) / float(size) + eps));
        for (int i = 0; i < size; i += 2 * W) {
            vfloat first = load(to + i) * factor * first_as<T, B>(weight + i);
            vfloat second = load(to + i + W) * factor * second_as<T, B>(weight + i);
            store(to + i, rounded<T>(first));
            store(to + i + W, rounded<T>(second));
        }
    }
}

template <class T, class B> void take_rows(const T* from, int num_rows, int size, float* x) {
    for (int64_t row = 0; row < num_rows; row++) take_row<T, B>(from + row * size, size, x + row * size);
}

// [rows, width] = x w^T + bias, the columns of `part`.
template <class T, class B>
void project(Matrix<T, B> w, int num_k, Range part, const float* x, int num_rows, float* sums, T* out, int width) {
    linear(w.weight, num_k, part, x, num_rows, sums,
           [=](int m, int n, float sum) { out[int64_t(m) * width + n] = from_float<T>(w.result(n, sum)); });
}

// The same, added to `out`.
template <class T, class B>
void project_and_add(Matrix<T, B> w, int num_k, Range part, const float* x, int num_rows, float* sums, T* out,
                     int width) {
    linear(w.weight, num_k, part, x, num_rows, sums, [=](int m, int n, float sum) {
        T& into = out[int64_t(m) * width + n];
        into = from_float<T>(to_float(into) + rounded<T>(w.result(n, sum)));
    });
}

// Turns one head by its position, in place; see layers.Rotary.
template <class T> void turn(T* head, const T* cos, const T* sin, int dim) {
    T turned[MAX_HEAD_DIM];
    int half = dim / 2;
    for (int d = 0; d < dim; d++) {
        float swapped = to_float(head[d < half ? d + half : d - half]);
        float scaled = rounded<T>(to_float(head[d]) * to_float(cos[d]));
        turned[d] = from_float<T>(scaled + swapped * to_float(sin[d]));
    }
    std::copy(turned, turned + dim, head);
}

// Puts a token's key or value into its slot. The first of a block clears what the last owner left behind it.
template <class T> void keep(const T* from, const Cache<T>& cache, int64_t slot, int kind, int head) {
    int dim = cache.head_dim;
    int64_t place = slot % cache.block_size;
    T* block = cache.at(slot / cache.block_size, kind, head);
    if (place == 0) std::fill(block + dim, block + int64_t(cache.block_size) * dim, T{});
    std::copy(from, from + dim, block + place * dim);
}

// Turns the heads of one token that belong to K/V head `head`, and keeps its key and value.
template <class T, class B>
void turn_and_keep(const Model<T, B>& model, const Cache<T>& cache, int64_t position, int64_t slot, int head, T* row) {
    int dim = model.head_dim, group = model.num_heads / model.num_kv_heads;
    const T *cos = model.cos + position * dim, *sin = model.sin + position * dim;
    for (int g = 0; g < group; g++) turn(row + (head * group + g) * dim, cos, sin, dim);
    T* key = row + (model.num_heads + head) * dim;
    turn(key, cos, sin, dim);
    keep(key, cache, slot, 0, head);
    keep(key + model.num_kv_heads * dim, cache, slot, 1, head);
}

// Attention of one token's query heads that share K/V head `head`: q to out, at the same places in their rows.
template <class T, class B>
void attend_heads(const Model<T, B>& model, const Cache<T>& cache, const int32_t* table, int head, int context,
                  int64_t stride, const T* q, T* out, float* scores) {
    int dim = model.head_dim, group = model.num_heads / model.num_kv_heads;
    float scaled[4 * MAX_HEAD_DIM], found[4 * MAX_HEAD_DIM];
    for (int g = 0; g < group;) {
        int64_t place = (int64_t(head) * group + g) * dim;
        int count = std::min(group - g, 4);
        take_row<T, T>(q + place, count * dim, scaled);
        for (int i = 0; i < count * dim; i++) scaled[i] *= model.scale;
        auto run = count == 4 ? attend<T, 4> : count == 3 ? attend<T, 3> : count == 2 ? attend<T, 2> : attend<T, 1>;
        run(cache, table, head, context, scaled, scores, stride, found);
        for (int i = 0; i < count * dim; i += 2 * W) Pair<T>::put(out + place + i, load(found + i), load(found + i + W));
        g += count;
    }
}

// silu(gate) * up, the columns of `part` [whole pairs].
template <class T> void activate(const T* gate_up, int num_rows, int inner, Range part, T* out) {
    auto one = [](vfloat gate, vfloat up) {
        vfloat power = exp_of_negative(gate < 0.0f ? gate : -gate), one = splat(1.0f);
        vfloat silu = gate * ((gate < 0.0f ? power : one) / (one + power));
        return rounded<T>(silu) * up;
    };
    for (int64_t m = 0; m < num_rows; m++) {
        const T *gate = gate_up + m * 2 * inner, *up = gate + inner;
        for (int n = part.begin; n < part.end; n += 2 * W) {
            vfloat first = one(Pair<T>::first(gate + n), Pair<T>::first(up + n));
            Pair<T>::put(out + m * inner + n, first, one(Pair<T>::second(gate + n), Pair<T>::second(up + n)));
        }
    }
}

// One thread's part of a layer's attention. `put` is project or project_and_add, into `out` [num_tokens, hidden].
template <class T, class B, class Put>
void attention_of(const Model<T, B>& model, const Layer<T, B>& layer, const Step& step, const T* hidden, T* out,
                  Shared<T>& shared, Scratch& own, int thread, int threads, Put put) {
    int dim = model.head_dim, rows = step.num_tokens;
    int width = (model.num_heads + 2 * model.num_kv_heads) * dim, inner = model.num_heads * dim;
    float *x = own.x.data(), *sums = own.sums.data();
    normed<T, B>(hidden, layer.attention_norm, rows, model.hidden, model.eps, x);
    share_out(width, UNIT, threads, [&](Range part) {
        project(layer.qkv, model.hidden, part, x, rows, sums, shared.qkv.data(), width);
    });
    Cache<T> cache{layer.cache, model.num_kv_heads, model.block_size, dim};
    for (int t = 0; t < rows; t++) {
        for (int head = 0; head < model.num_kv_heads; head++) {
            // all of a sequence by one thread: what clears a block comes before what fills it
            if ((step.sequences[t] + head) % threads != thread) continue;
            T* row = shared.qkv.data() + int64_t(t) * width;
            turn_and_keep(model, cache, step.positions[t], step.slots[t], head, row);
        }
    }
    int64_t stride = (step.max_context + W - 1) / W * W;
#pragma omp barrier
#pragma omp for schedule(dynamic) collapse(2)
    for (int t = 0; t < rows; t++) {
        for (int head = 0; head < model.num_kv_heads; head++) {
            const int32_t* table = step.tables + int64_t(step.sequences[t]) * step.table_width;
            attend_heads(model, cache, table, head, int(step.positions[t]) + 1, stride,
                         shared.qkv.data() + int64_t(t) * width, shared.attended.data() + int64_t(t) * inner,
                         own.scores.data());
        }
    }
    take_rows<T, B>(shared.attended.data(), rows, inner, x);
    share_out(model.hidden, UNIT, threads,
              [&](Range part) { put(layer.output, inner, part, x, rows, sums, out, model.hidden); });
}

template <class T, class B, class Put>
void mlp_of(const Model<T, B>& model, const Layer<T, B>& layer, const Step& step, const T* hidden, T* out,
            Shared<T>& shared, Scratch& own, int threads, Put put) {
    int rows = step.num_tokens, inner = model.intermediate;
    float *x = own.x.data(), *sums = own.sums.data();
    normed<T, B>(hidden, layer.mlp_norm, rows, model.hidden, model.eps, x);
    T *gate_up = shared.gate_up.data(), *activated = shared.activated.data();
    share_out(inner, 2 * W, threads, [&](Range part) {
        for (int first : {0, inner}) {
            Matrix<T, B> half = layer.gate_up.from(first, model.hidden);
            project(half, model.hidden, part, x, rows, sums, gate_up + first, 2 * inner);
        }
        activate(gate_up, rows, inner, part, activated);
    });
    take_rows<T, B>(activated, rows, inner, x);
    share_out(model.hidden, UNIT, threads,
              [&](Range part) { put(layer.down, inner, part, x, rows, sums, out, model.hidden); });
}

enum Parts { ATTENTION = 1, MLP = 2 };

// Layers first .. last, those parts of them. With `out` the sum of what they add goes there, instead of to `hidden`:
// a share that is still to be summed over the ranks.
template <class T, class B>
void run(const Model<T, B>& model, const Step& step, int first, int last, int parts, T* hidden, T* out) {
    static Shared<T> shared;  // one caller at a time: the rank's only thread that computes
    size_t rows = step.num_tokens, inner = size_t(model.num_heads) * model.head_dim;
    make_room(shared.qkv, rows * (inner + 2 * size_t(model.num_kv_heads) * model.head_dim));
    make_room(shared.attended, rows * inner);
    make_room(shared.gate_up, rows * 2 * model.intermediate);
    make_room(shared.activated, rows * model.intermediate);
    size_t widest = std::max({size_t(model.hidden), size_t(model.intermediate), inner});
#pragma omp parallel num_threads(step.num_threads)
    {
        static thread_local Scratch own;
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        size_t columns = std::max(widest, inner + 2 * size_t(model.num_kv_heads) * model.head_dim) / threads + 2 * W;
        make_room(own.x, rows * widest);
        make_room(own.sums, widest > K_BLOCK ? rows * columns : 0);
        make_room(own.scores, 4 * (size_t(step.max_context) + W));
        for (int i = first; i < last; i++) {
            const Layer<T, B>& layer = model.layers[i];
            if (parts & ATTENTION) {
                attention_of(model, layer, step, hidden, out ? out : hidden, shared, own, thread, threads,
                             out ? project<T, B> : project_and_add<T, B>);
            }
            if (parts & MLP) {
                mlp_of(model, layer, step, hidden, out ? out : hidden, shared, own, threads,
                       out ? project<T, B> : project_and_add<T, B>);
            }
        }
    }
}

// y [num_rows, num_n] = x [num_rows, num_k] w^T + bias.
template <class T, class B>
void linear_of(Matrix<T, B> w, const T* x, T* y, int num_rows, int num_k, int num_n, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        static thread_local Scratch own;
        int threads = omp_get_num_threads();
        make_room(own.x, size_t(num_rows) * num_k);
        make_room(own.sums, num_k > K_BLOCK ? size_t(num_rows) * part_size(num_n, UNIT, threads) : 0);
        take_rows<T, B>(x, num_rows, num_k, own.x.data());
        share_out(num_n, UNIT, threads, [&](Range part) {
            project(w, num_k, part, own.x.data(), num_rows, own.sums.data(), y, num_n);
        });
    }
}

}  // namespace sluice

// Each for values and weights in these types: sluice_run_float32_int8 and so on.
#define SLUICE_EXPORT(NAME, T, B)                                                                                 \
    extern "C" void sluice_run_##NAME(const sluice::Model<T, B>* model, const sluice::Step* step, int first,      \
                                      int last, int parts, T* hidden, T* out) {                                   \
        sluice::run(*model, *step, first, last, parts, hidden, out);                                              \
    }                                                                                                             \
    extern "C" void sluice_linear_##NAME(const B* weight, const float* scale, const T* bias, const T* x, T* y,    \
                                         int num_rows, int num_k, int num_n, int num_threads) {                   \
        sluice::linear_of<T, B>({weight, scale, bias}, x, y, num_rows, num_k, num_n, num_threads);                \
    }

SLUICE_EXPORT(float32_float32, float, float)
SLUICE_EXPORT(bfloat16_bfloat16, sluice::bfloat16, sluice::bfloat16)
SLUICE_EXPORT(float32_int8, float, int8_t)
SLUICE_EXPORT(bfloat16_int8, sluice::bfloat16, int8_t)

extern "C" int sluice_pair_width() { return 2 * sluice::W; }
