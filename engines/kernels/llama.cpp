// Decoder layers of a Llama: everything between two of torch's calls in one.
// Between its parts values are rounded to the model's dtype wherever torch's own layers round them.
// The structs are mirrored in engines/kernels/library.py.

#include <cstdlib>
#include <memory>
#include <vector>

#include "prompt_attention.h"
#include "ranks.h"

namespace sluice {

// How many numbers one of a matrix's has in it.
template <class B> constexpr int NUMBERS_OF = 1;
template <> constexpr int NUMBERS_OF<Group> = Group::NUMBERS;

// One matrix, in T, or packed or in int8 with a scale for each row; `bias` may be null. If `keeps_rows`, what it is
// multiplied by loses no bits for being many rows.
template <class T, class B> struct Matrix {
    const B* weight;
    const float* scale;
    const T* bias;
    Patches patches;  // of packed ones
    int32_t keeps_rows;

    float result(int n, float sum) const {
        if (scale) sum *= scale[n];
        return bias ? sum + to_float(bias[n]) : sum;
    }

    // Of W columns from n on.
    vfloat result(int n, vfloat sums) const {
        if (scale) sums *= load(scale + n);
        return bias ? sums + consecutive(bias + n) : sums;
    }

    Matrix from(int64_t row, int num_k) const {
        Patches rest = patches;
        if (rest.starts) rest.starts += row;
        return {weight + row * num_k / NUMBERS_OF<B>, scale ? scale + row : nullptr, bias ? bias + row : nullptr, rest,
                keeps_rows};
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

template <class B> constexpr int MANY = 16;  // rows from which on many_rows is the faster
template <> constexpr int MANY<Group> = 24;

template <class B> inline bool is_many(int num_rows, bool is_deterministic) {
    return num_rows >= MANY<B> && !is_deterministic;
}

struct Step {
    const int64_t *positions, *slots;  // [num_tokens]
    const int32_t* sequences;          // [num_tokens], rows of `tables`
    const int32_t* tables;             // [., table_width]
    int32_t num_tokens, table_width, max_context, num_threads;
    int32_t is_deterministic;  // a token's result depends on no other's
};

// Those tokens of a step whose results are read, ascending: where they are in it, and the step of them alone. The
// last layer owes the others nothing but keys and values.
struct Chosen {
    const int32_t* rows;
    Step step;
};

// Memory that grows, at the start of a cache line.
template <class T> class Buffer {
public:
    T* data() const { return memory.get(); }

    void make_room(size_t size) {
        if (size <= room) return;
        memory.reset(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64)));
        room = size;
    }

private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory;
    size_t room = 0;
};

// Rows in panels, with their scales or those of their blocks.
struct Panels {
    Buffer<float> x, scales;
    Buffer<Block> blocks;
};

// Tokens of a sequence that stand side by side: [first, first + count) of a step.
struct Tile {
    int first, count;
};

inline int whole_vectors(int numbers) { return (numbers + W - 1) / W * W; }

// What the threads hand to each other.
template <class T> struct Shared {
    Buffer<T> qkv, attended, activated, chosen;
    Panels panels;
    std::vector<Tile> tiles, chosen_tiles;
};

// Rows times the columns of a part of a matrix: as many_rows leaves them, and row by row.
struct Products {
    Buffer<float> turned, sums;
};

// The rows that a matrix is multiplied by, as few_rows or many_rows wants them.
struct Input {
    const float *x, *scales;
    const Block* blocks;
    int num_rows, num_k;
    bool is_many, is_fit;
};

// What one thread has for itself.
struct Scratch {
    Buffer<float> x, row, scales, q, found, scores;
    Products products, others;
    Buffer<TileRoom> tile;
    Input rows;           // few ones
    int64_t rows_of = 0;  // the number of those
};

// In which rows of T are multiplied by weights in B. float32 keeps float32 rows whatever the weights are.
template <class T, class B> struct ArithmeticOf {
    typedef Floats<B> type;
};

#if defined(__AVX512BF16__)
template <class B> struct ArithmeticOf<bfloat16, B> {
    typedef Halves<B> type;
};
#else
template <> struct ArithmeticOf<bfloat16, int8_t> {
    typedef Ints type;
};
#endif

#if SLUICE_PACKS
template <> struct ArithmeticOf<bfloat16, Group> {
    typedef Packed type;
};
#endif

template <class T, class B> using Arithmetic = typename ArithmeticOf<T, B>::type;

// The same for many rows, where `fits` says so.
template <class T, class B> struct ManyArithmeticOf {
    typedef Arithmetic<T, B> type;
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
template <> struct ManyArithmeticOf<bfloat16, int8_t> {
    typedef Bytes type;
};
#endif

template <class T, class B> using ManyArithmetic = typename ManyArithmeticOf<T, B>::type;

template <class T, class B> inline bool fits(const Matrix<T, B>& w, int num_k) {
    return !w.keeps_rows && num_k % (ManyArithmetic<T, B>::NUMBERS * W) == 0;
}

constexpr int UNIT = 16;           // columns of a result that one thread takes at least: a cache line of it or two
constexpr int MANY_UNIT = 24;      // the same where they are made in strips
constexpr int MOST_COLUMNS = 192;  // that it takes at once: the sums stay in the second-level cache

// What `make_panels` writes to, and what one thread needs for `multiply`.
inline void make_room(Panels& panels, size_t num_rows, size_t most_k) {
    size_t rows = num_panels(int(num_rows)) * PANEL;
    panels.x.make_room(rows * most_k);
    panels.scales.make_room(rows);
    panels.blocks.make_room(num_panels(int(num_rows)) * num_blocks(int(most_k)));
}

inline void make_room(Scratch& own, size_t num_rows, size_t most_k, bool in_panels) {
    size_t rows = num_panels(int(num_rows)) * PANEL;
    size_t at_once = in_panels ? PANEL : rows;  // no fewer than the few that may be left of many
    own.x.make_room(at_once * most_k);
    own.row.make_room(most_k);
    own.scales.make_room(rows);
    for (Products* products : {&own.products, &own.others}) {
        products->turned.make_room(in_panels ? rows * MOST_COLUMNS : 0);
        products->sums.make_room(at_once * MOST_COLUMNS);
    }
}

inline Scratch& own_scratch() {
    static thread_local Scratch own;
    return own;
}

// The threads that take a step, and the room that each needs.
struct Crew {
    int threads;
    size_t num_rows, most_k;
    bool in_panels;

    // `work(part, own)` on the parts of `count`, of `size` each.
    template <class Work> void share(int count, int size, Work work) const {
        share_out(count, size, threads, [&](Range part) {
            Scratch& own = own_scratch();
            make_room(own, num_rows, most_k, in_panels);
            work(part, own);
        });
    }

    // The same in whole units, so that each thread takes several parts: one whose core another program uses for a
    // while leaves more of them to the others.
    template <class Work> void share_columns(int count, int unit, int most, Work work) const {
        int units = (count + unit - 1) / unit, parts = 8 * threads;
        share(count, std::min((units + parts - 1) / parts * unit, most / unit * unit), work);
    }
};

// Row `row` of a panel from float32 into A's numbers.
template <class A> void put_row_of(int row, int num_k, const float* from, float* to, float* scale, Block* blocks) {
    if constexpr (A::HAS_BLOCK_SCALES) {
        for (int k = 0; k < num_k; k += DEPTH, blocks++) {
            int depth = std::min(DEPTH, num_k - k);
            A::take(from + k, depth, to + k / A::NUMBERS, blocks->scales + row, blocks->starts + row);
        }
    } else if constexpr (A::HAS_SCALES) {
        *scale = A::take(from, num_k, to);
    } else {
        A::take(from, num_k, to);
    }
}

// `take(row, to)` puts a row into float32. The threads share out the panels, by halves.
template <class A, class Take>
Input make_panels(const Crew& crew, int num_rows, int num_k, const Panels& panels, Take take) {
    float* scales = panels.scales.data();
    int64_t size = num_k / A::NUMBERS;
    crew.share(num_rows, W, [&](Range part, Scratch& own) {
        int p = part.begin / PANEL, first = part.begin % PANEL;
        float* x = own.x.data();
        Block* blocks = panels.blocks.data() + p * num_blocks(num_k);
        for (int i = 0; i < part.size(); i++) {
            int row = part.begin + i;
            if constexpr (A::NUMBERS == 1) {
                take(row, x + i * size);
            } else {
                take(row, own.row.data());
                put_row_of<A>(first + i, num_k, own.row.data(), x + i * size, scales + row, blocks);
            }
        }
        std::fill(x + part.size() * size, x + W * size, 0.0f);
        pack_half(x, size, int(size), panels.x.data() + p * PANEL * size + first);
    });
    return {panels.x.data(), scales, panels.blocks.data(), num_rows, num_k, true, A::HAS_BLOCK_SCALES};
}

// The same for few rows, which every thread takes for itself.
template <class A, class Take> Input make_rows(int num_rows, int num_k, Scratch& own, Take take) {
    float *x = own.x.data(), *scales = own.scales.data();
    int64_t size = num_k / A::NUMBERS;
    for (int row = 0; row < num_rows; row++) {
        if constexpr (A::NUMBERS == 1) {
            take(row, x + row * size);
        } else {
            take(row, own.row.data());
            put_row_of<A>(row, num_k, own.row.data(), x + row * size, scales + row, nullptr);
        }
    }
    return {x, scales, nullptr, num_rows, num_k, false, false};
}

inline int64_t next_number() {
    static int64_t last = 0;
    return ++last;
}

// What a matrix is to be multiplied by: many rows are made ready by all threads at once, few by each for itself.
template <class T, class B, class Take> class Rows {
public:
    Rows(const Crew& crew, const Matrix<T, B>& w, int num_rows, int num_k, bool is_deterministic, const Panels& panels,
         Take take)
        : num_rows(num_rows), num_k(num_k), take(take), panels{} {
        static_assert(std::is_same_v<typename A::Order, typename Many::Order>);
        number = next_number();
        if (!is_many<B>(num_rows, is_deterministic)) return;
        this->panels = fits(w, num_k) ? make_panels<Many>(crew, num_rows, num_k, panels, take)
                                      : make_panels<A>(crew, num_rows, num_k, panels, take);
    }

    int unit() const { return panels.is_many ? MANY_UNIT : UNIT; }

    bool are_many() const { return panels.is_many; }

    Input of(Scratch& own) const {
        if (panels.is_many) return panels;
        if (own.rows_of != number) {
            own.rows = make_rows<A>(num_rows, num_k, own, take);
            own.rows_of = number;
        }
        return own.rows;
    }

private:
    typedef Arithmetic<T, B> A;
    typedef ManyArithmetic<T, B> Many;
    int num_rows, num_k;
    Take take;
    Input panels;
    int64_t number;
};

// A row of hidden [size] over its root mean square, times weight.
template <class T, class B> void take_normed(const T* from, const T* weight, int size, float eps, float* to) {
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

// The columns of `part`.
template <class T, class B>
void multiply(const Matrix<T, B>& w, Range part, const Input& input, Products& to) {
    typedef Arithmetic<T, B> A;
    typedef ManyArithmetic<T, B> Many;
    int columns = whole_vectors(part.size());
    if (!input.is_many) {
        few_rows<A>(w.weight, input.num_k, part, input.x, w.patches, input.num_rows, to.sums.data(), columns);
        return;
    }
    auto run = input.is_fit ? many_rows<Many> : many_rows<A>;
    float* turned = to.turned.data();
    run(w.weight, input.num_k, part, input.x, input.blocks, w.patches, input.num_rows, turned, columns);
}

// `put(m, sums...)` gets row m of each of `products`, of the columns of `part`.
template <class A, class Put, class... Each>
void put_rows(Range part, const Input& input, Put put, Each&... products) {
    int columns = whole_vectors(part.size()), at_once = input.is_many ? W : input.num_rows;
    auto row_of = [&](Products& of, int i, int m) {
        float* row = of.sums.data() + i * columns;
        if constexpr (A::HAS_SCALES) {
            for (int n = 0; n < columns; n += W) store(row + n, load(row + n) * input.scales[m]);
        }
        return row;
    };
    for (int begin = 0; begin < input.num_rows; begin += at_once) {
        if (input.is_many) (turn_back(products.turned.data(), begin, columns, products.sums.data()), ...);
        int count = std::min(at_once, input.num_rows - begin);
        for (int i = 0; i < count; i++) put(begin + i, row_of(products, i, begin + i)...);
    }
}

// out [rows, width] = x w^T + bias, the columns of `part`, rounded to T.
template <class T, class B, class Out>
void project(Matrix<T, B> w, Range part, const Input& input, Scratch& own, Out* out, int width) {
    constexpr bool IS_WIDER = !std::is_same_v<T, Out>;
    multiply(w, part, input, own.products);
    auto put = [=](int m, const float* sums) {
        Out* into = out + int64_t(m) * width;
        int n = part.begin;
        for (; n + W <= part.end; n += W, sums += W) {
            vfloat found = w.result(n, load(sums));
            put_consecutive(into + n, IS_WIDER ? rounded<T>(found) : found);
        }
        for (; n < part.end; n++) into[n] = from_float<Out>(rounded<T>(w.result(n, *sums++)));
    };
    put_rows<Arithmetic<T, B>>(part, input, put, own.products);
}

// The same, added to `out`.
template <class T, class B>
void project_and_add(Matrix<T, B> w, Range part, const Input& input, Scratch& own, T* out, int width) {
    multiply(w, part, input, own.products);
    auto put = [=](int m, const float* sums) {
        T* into = out + int64_t(m) * width;
        int n = part.begin;
        for (; n + W <= part.end; n += W, sums += W) {
            put_consecutive(into + n, consecutive(into + n) + rounded<T>(w.result(n, load(sums))));
        }
        for (; n < part.end; n++) into[n] = from_float<T>(to_float(into[n]) + rounded<T>(w.result(n, *sums++)));
    };
    put_rows<Arithmetic<T, B>>(part, input, put, own.products);
}

// out [rows, inner] = silu(x gate^T) * (x up^T), the columns of `part`, in whole vectors: gate and up are the halves
// of `w`.
template <class T, class B>
void project_and_activate(const Matrix<T, B>& w, Range part, const Input& input, Scratch& own, T* out, int inner) {
    Matrix<T, B> gate = w.from(0, input.num_k), up = w.from(inner, input.num_k);
    multiply(gate, part, input, own.products);
    multiply(up, part, input, own.others);
    auto put = [=](int m, const float* gates, const float* ups) {
        T* into = out + int64_t(m) * inner;
        for (int n = part.begin; n < part.end; n += W, gates += W, ups += W) {
            vfloat x = rounded<T>(gate.result(n, load(gates))), one = splat(1.0f);
            vfloat power = exp_of_negative(x < 0.0f ? x : -x);
            vfloat silu = x * ((x < 0.0f ? power : one) / (one + power));
            put_consecutive(into + n, rounded<T>(silu) * rounded<T>(up.result(n, load(ups))));
        }
    };
    put_rows<Arithmetic<T, B>>(part, input, put, own.products, own.others);
}

// Turns one head by its position, in place; see layers.Rotary.
template <class T> void turn(T* head, const T* cos, const T* sin, int dim) {
    int half = dim / 2;
    if (half % W == 0) {
        for (int d = 0; d < half; d += W) {
            T *first = head + d, *second = first + half;
            vfloat x = consecutive(first), y = consecutive(second);
            put_consecutive(first, rounded<T>(x * consecutive(cos + d)) + y * consecutive(sin + d));
            put_consecutive(second, rounded<T>(y * consecutive(cos + d + half)) + x * consecutive(sin + d + half));
        }
        return;
    }
    T turned[MAX_HEAD_DIM];
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

// Turns the queries of one token that share K/V head `head`.
template <class T, class B> void turn_queries(const Model<T, B>& model, int64_t position, int head, T* row) {
    int dim = model.head_dim, group = model.num_heads / model.num_kv_heads;
    const T *cos = model.cos + position * dim, *sin = model.sin + position * dim;
    for (int g = 0; g < group; g++) turn(row + (head * group + g) * dim, cos, sin, dim);
}

// Turns its key, and keeps key and value.
template <class T, class B>
void turn_and_keep(const Model<T, B>& model, const Cache<T>& cache, int64_t position, int64_t slot, int head, T* row) {
    int dim = model.head_dim;
    T* key = row + (model.num_heads + head) * dim;
    turn(key, model.cos + position * dim, model.sin + position * dim, dim);
    keep(key, cache, slot, 0, head);
    keep(key + model.num_kv_heads * dim, cache, slot, 1, head);
}

constexpr size_t SCORES_AT_ONCE = 64 << 10;  // of a thread: they stay in the second-level cache

// Of `num_tiles`, which `threads` share: several, for they are read as they lie, but not all where tiles are few.
inline int kv_heads_at_once(int num_kv_heads, int num_tiles, int threads, int64_t scores_of_each) {
    int parts = std::clamp((8 * threads + num_tiles - 1) / num_tiles, 1, num_kv_heads);
    int most = int(std::max<int64_t>(1, int64_t(SCORES_AT_ONCE) / scores_of_each));
    return std::min((num_kv_heads + parts - 1) / parts, most);
}

// Attention of one token's query heads that share K/V heads `own.heads`: q to out, at the same places in their rows.
template <class T, class B>
void attend_heads(const Model<T, B>& model, const Cache<T>& cache, const Context& own, const Context& next,
                  int64_t stride, const T* q, T* out, Scratch& room) {
    typedef Arithmetic<T, T> A;
    int dim = model.head_dim, group = model.num_heads / model.num_kv_heads, size = own.heads.size() * group * dim;
    int64_t place = int64_t(own.heads.begin) * group * dim;
    float *rows = room.q.data(), *found = room.found.data();
    for (int k = 0; k < size; k += 2 * W) {
        for (int word = 0; word < 2 * W / A::NUMBERS; word += W) {
            A::store(rows + k / A::NUMBERS + word, A::weight(q + place + k, word));
        }
    }
    attend<T, A>(cache, own, next, group, rows, model.scale, room.scores.data(), stride, found);
    put_row(found, size, out + place);
}

constexpr int TURNS = 4;  // parts of a step's sequences, for each K/V head: so many that threads share them evenly

// Queries, keys and values.
struct Heads {
    bool queries, others;
};

// A layer's heads, those that are wanted: in shared.qkv, keys and values where they are kept.
template <class T, class B>
void heads_of(const Crew& crew, const Model<T, B>& model, const Layer<T, B>& layer, const Step& step, Heads wanted,
              const T* hidden, const Shared<T>& shared) {
    typedef typename Arithmetic<T, B>::Order Order;
    int dim = model.head_dim, num_tokens = step.num_tokens;
    int width = (model.num_heads + 2 * model.num_kv_heads) * dim, inner = model.num_heads * dim;
    int first = wanted.queries ? 0 : inner, last = wanted.others ? width : inner;
    auto take = [&](int64_t row, float* to) {
        take_normed<T, Order>(hidden + row * model.hidden, layer.attention_norm, model.hidden, model.eps, to);
    };
    Rows rows(crew, layer.qkv, num_tokens, model.hidden, step.is_deterministic, shared.panels, take);
    crew.share_columns(last - first, rows.unit(), MOST_COLUMNS, [&](Range part, Scratch& own) {
        Range columns{first + part.begin, first + part.end};
        project(layer.qkv, columns, rows.of(own), own, shared.qkv.data(), width);
    });
    Cache<T> cache{layer.cache, model.num_kv_heads, model.block_size, dim};
    int turns = std::min(TURNS, num_tokens);
    crew.share(turns * model.num_kv_heads, 1, [&](Range part, Scratch&) {
        int turn = part.begin / model.num_kv_heads, head = part.begin % model.num_kv_heads;
        for (int t = 0; t < num_tokens; t++) {
            // all of a sequence in one part: what clears a block comes before what fills it
            if (step.sequences[t] % turns != turn) continue;
            T* row = shared.qkv.data() + int64_t(t) * width;
            if (wanted.queries) turn_queries(model, step.positions[t], head, row);
            if (wanted.others) turn_and_keep(model, cache, step.positions[t], step.slots[t], head, row);
        }
    });
}

// A layer's attention, after heads_of. `put` is project or project_and_add, into `out` [num_tokens, hidden].
template <class T, class B, class Put>
void attention_of(const Crew& crew, const Model<T, B>& model, const Layer<T, B>& layer, const Step& step,
                  const std::vector<Tile>& tiles, T* out, const Shared<T>& shared, Put put) {
    typedef typename Arithmetic<T, B>::Order Order;
    int dim = model.head_dim, group = model.num_heads / model.num_kv_heads, num_tiles = int(tiles.size());
    int width = (model.num_heads + 2 * model.num_kv_heads) * dim, inner = model.num_heads * dim;
    Cache<T> cache{layer.cache, model.num_kv_heads, model.block_size, dim};
    int64_t stride = whole_vectors(step.max_context);
    int heads = kv_heads_at_once(model.num_kv_heads, num_tiles, crew.threads, group * stride);
    int parts = (model.num_kv_heads + heads - 1) / heads, num_parts = num_tiles * parts;
    auto context_of = [&](int i) -> Context {
        Tile tile = tiles[i / parts];
        int begin = i % parts * heads, last = tile.first + tile.count - 1;
        return {step.tables + int64_t(step.sequences[last]) * step.table_width, int(step.positions[last]) + 1,
                {begin, std::min(begin + heads, model.num_kv_heads)}};
    };
    auto attend_part = [&](int i, Scratch& own) {
        int then = i + crew.threads;
        Context context = context_of(i), next = context_of(then < num_parts ? then : i);
        Tile tile = tiles[i / parts];
        const T* q = shared.qkv.data() + int64_t(tile.first) * width;
        T* to = shared.attended.data() + int64_t(tile.first) * inner;
        if (tile.count == 1) {
            own.q.make_room(inner);
            own.found.make_room(inner);
            own.scores.make_room(std::max(SCORES_AT_ONCE, size_t(group * stride)));
            attend_heads(model, cache, context, next, stride, q, to, own);
            return;
        }
        own.tile.make_room(1);
        for (int head = context.heads.begin; head < context.heads.end; head++) {
            int place = head * group * dim, position = int(step.positions[tile.first]);
            attend_tile<T, Arithmetic<T, T>>(cache, context.table, head, position, tile.count, group, q + place, width,
                                             model.scale, to + place, inner, *own.tile.data());
        }
    };
    crew.share(num_parts, 1, [&](Range part, Scratch& own) {
        for (int i = part.begin; i < part.end; i++) attend_part(i, own);
    });
    auto take = [&](int64_t row, float* to) { take_row<T, Order>(shared.attended.data() + row * inner, inner, to); };
    Rows rows(crew, layer.output, step.num_tokens, inner, step.is_deterministic, shared.panels, take);
    crew.share_columns(model.hidden, rows.unit(), MOST_COLUMNS, [&](Range part, Scratch& own) {
        put(layer.output, part, rows.of(own), own, out, model.hidden);
    });
}

template <class T, class B, class Put>
void mlp_of(const Crew& crew, const Model<T, B>& model, const Layer<T, B>& layer, const Step& step, const T* hidden,
            T* out, const Shared<T>& shared, Put put) {
    typedef typename Arithmetic<T, B>::Order Order;
    int num_tokens = step.num_tokens, inner = model.intermediate;
    T* activated = shared.activated.data();
    auto take = [&](int64_t row, float* to) {
        take_normed<T, Order>(hidden + row * model.hidden, layer.mlp_norm, model.hidden, model.eps, to);
    };
    Rows rows(crew, layer.gate_up, num_tokens, model.hidden, step.is_deterministic, shared.panels, take);
    int unit = rows.are_many() ? 6 * W : 2 * W;  // whole pairs, and whole strips
    crew.share_columns(inner, unit, MOST_COLUMNS / 2, [&](Range part, Scratch& own) {
        project_and_activate(layer.gate_up, part, rows.of(own), own, activated, inner);
    });
    auto take_activated = [&](int64_t row, float* to) { take_row<T, Order>(activated + row * inner, inner, to); };
    Rows others(crew, layer.down, num_tokens, inner, step.is_deterministic, shared.panels, take_activated);
    crew.share_columns(model.hidden, others.unit(), MOST_COLUMNS, [&](Range part, Scratch& own) {
        put(layer.down, part, others.of(own), own, out, model.hidden);
    });
}

// A step's tokens in tiles of several where a sequence has them, of one each for `deterministic`: so a token's result
// does not depend on how its prompt is cut.
inline void make_tiles(const Step& step, int group, std::vector<Tile>& tiles) {
    int most = step.is_deterministic ? 1 : std::max(1, TILE_ROWS / group);
    tiles.clear();
    for (int t = 0; t < step.num_tokens; t++) {
        bool is_next = t > 0 && step.sequences[t] == step.sequences[t - 1] &&
                       step.positions[t] == step.positions[t - 1] + 1;
        if (is_next && tiles.back().count < most) {
            tiles.back().count++;
        } else {
            tiles.push_back({t, 1});
        }
    }
}

// hidden [num_tokens, hidden] through the layers. With several ranks each has a share of every layer, and
// what the shares add is summed over `ranks` before it goes to hidden: two operations a layer. After the last layer
// only the rows of `chosen`, if it is given, are what they should be. Returns the operation that a rank did not come
// to in time, 0 if all went well.
template <class T, class B>
int64_t run(const Model<T, B>& model, const Step& step, int num_layers, T* hidden, const Ranks* ranks,
            const Chosen* chosen) {
    static Shared<T> shared;  // one caller at a time: the rank's only thread that computes
    size_t rows = step.num_tokens, inner = size_t(model.num_heads) * model.head_dim;
    bool in_panels = is_many<B>(step.num_tokens, step.is_deterministic);
    make_tiles(step, model.num_heads / model.num_kv_heads, shared.tiles);
    if (chosen) {
        make_tiles(chosen->step, model.num_heads / model.num_kv_heads, shared.chosen_tiles);
        shared.chosen.make_room(size_t(chosen->step.num_tokens) * model.hidden);
    }
    shared.qkv.make_room(rows * (inner + 2 * size_t(model.num_kv_heads) * model.head_dim));
    shared.attended.make_room(rows * inner);
    shared.activated.make_room(rows * model.intermediate);
    Crew crew{step.num_threads, rows, std::max({size_t(model.hidden), size_t(model.intermediate), inner}), in_panels};
    if (in_panels) make_room(shared.panels, rows, crew.most_k);
    if (ranks && !wait_for(*ranks, ranks->operation)) return ranks->operation;
    int64_t operation = ranks ? ranks->operation + 1 : 0;
    auto put = ranks ? project<T, B, T> : project_and_add<T, B>;
    auto add_shares = [&](int num_rows, T* to) {
        if (!ranks) return true;
        if (!meet(*ranks, operation)) return false;
        crew.share(num_rows, 4, [&](Range part, Scratch&) {
            for (int row = part.begin; row < part.end; row++) {
                add_parts(*ranks, operation, row, model.hidden, to + int64_t(row) * model.hidden);
            }
        });
        operation++;
        return true;
    };
    auto rest_of = [&](const Layer<T, B>& layer, const Step& step, const std::vector<Tile>& tiles, T* hidden) {
        auto out = [&] { return ranks ? ranks->part<T>(operation, ranks->rank) : hidden; };
        attention_of(crew, model, layer, step, tiles, out(), shared, put);
        if (!add_shares(step.num_tokens, hidden)) return false;
        mlp_of(crew, model, layer, step, hidden, out(), shared, put);
        return add_shares(step.num_tokens, hidden);
    };
    int num_whole = num_layers - (chosen ? 1 : 0);
    for (int i = 0; i < num_whole; i++) {
        const Layer<T, B>& layer = model.layers[i];
        heads_of(crew, model, layer, step, {true, true}, hidden, shared);
        if (!rest_of(layer, step, shared.tiles, hidden)) return operation;
    }
    if (!chosen) return 0;
    const Layer<T, B>& last = model.layers[num_whole];
    heads_of(crew, model, last, step, {false, true}, hidden, shared);
    T* read = shared.chosen.data();
    auto row_of = [&](int i) { return hidden + int64_t(chosen->rows[i]) * model.hidden; };
    for (int i = 0; i < chosen->step.num_tokens; i++) std::copy_n(row_of(i), model.hidden, read + i * model.hidden);
    heads_of(crew, model, last, chosen->step, {true, false}, read, shared);
    if (!rest_of(last, chosen->step, shared.chosen_tiles, read)) return operation;
    for (int i = 0; i < chosen->step.num_tokens; i++) std::copy_n(read + i * model.hidden, model.hidden, row_of(i));
    return 0;
}

constexpr int ROWS_AT_ONCE = 128;  // of a matrix alone: they stay in the third-level cache

// y [num_rows, num_n] = x [num_rows, num_k] w^T + bias, rounded to T.
template <class T, class B, class Out>
void linear_of(Matrix<T, B> w, const T* x, Out* y, int num_rows, int num_k, int num_n, int num_threads,
               bool is_deterministic) {
    static Panels panels;
    int most_rows = std::min(num_rows, ROWS_AT_ONCE);
    bool in_panels = is_many<B>(most_rows, is_deterministic);  // but for a few rows at the end
    if (in_panels) make_room(panels, most_rows, num_k);
    Crew crew{num_threads, size_t(most_rows), size_t(num_k), in_panels};
    for (int begin = 0; begin < num_rows; begin += ROWS_AT_ONCE) {
        auto take = [&](int64_t row, float* to) {
            take_row<T, typename Arithmetic<T, B>::Order>(x + (begin + row) * num_k, num_k, to);
        };
        Rows rows(crew, w, std::min(ROWS_AT_ONCE, num_rows - begin), num_k, is_deterministic, panels, take);
        crew.share_columns(num_n, rows.unit(), MOST_COLUMNS, [&](Range part, Scratch& own) {
            project(w, part, rows.of(own), own, y + int64_t(begin) * num_n, num_n);
        });
    }
}

// out [num_rows, size] = the rows of x over their root mean square, times weight.
template <class T>
void norm(const T* x, const T* weight, T* out, int num_rows, int size, float eps, int num_threads) {
    Crew crew{num_threads, 1, size_t(size), false};
    crew.share(num_rows, (num_rows + 4 * num_threads - 1) / (4 * num_threads), [&](Range part, Scratch& own) {
        float* row = own.row.data();
        for (int m = part.begin; m < part.end; m++) {
            take_normed<T, T>(x + int64_t(m) * size, weight, size, eps, row);
            put_row(row, size, out + int64_t(m) * size);
        }
    });
}

}  // namespace sluice

// Each for values and weights in these types: sluice_run_float32_int8 and so on.
#define SLUICE_EXPORT(NAME, T, B)                                                                                 \
    extern "C" int64_t sluice_run_##NAME(const sluice::Model<T, B>* model, const sluice::Step* step,              \
                                         int num_layers, T* hidden, const sluice::Ranks* ranks,                   \
                                         const sluice::Chosen* chosen) {                                          \
        return sluice::run(*model, *step, num_layers, hidden, ranks, chosen);                                     \
    }                                                                                                             \
    extern "C" void sluice_linear_##NAME(const sluice::Matrix<T, B>* w, const T* x, void* y, int num_rows,        \
                                         int num_k, int num_n, int num_threads, int is_deterministic,             \
                                         int in_float32) {                                                        \
        auto to = [&](auto* y) {                                                                                  \
            sluice::linear_of(*w, x, y, num_rows, num_k, num_n, num_threads, is_deterministic);                   \
        };                                                                                                        \
        in_float32 ? to(static_cast<float*>(y)) : to(static_cast<T*>(y));                                         \
    }

SLUICE_EXPORT(float32_float32, float, float)
SLUICE_EXPORT(bfloat16_bfloat16, sluice::bfloat16, sluice::bfloat16)
SLUICE_EXPORT(float32_int8, float, int8_t)
SLUICE_EXPORT(bfloat16_int8, sluice::bfloat16, int8_t)

#if SLUICE_PACKS
SLUICE_EXPORT(bfloat16_packed, sluice::bfloat16, sluice::Group)

extern "C" int64_t sluice_find_patches(const sluice::bfloat16* w, int num_rows, int num_k, int64_t most,
                                       int num_threads, int64_t* starts) {
    return sluice::find_patches(w, num_rows, num_k, most, num_threads, starts);
}

extern "C" void sluice_pack(const sluice::bfloat16* w, int num_rows, int num_k, int num_threads, const int64_t* starts,
                            sluice::Group* to, float* scales, int32_t* columns, float* values) {
    sluice::pack(w, num_rows, num_k, num_threads, starts, to, scales, columns, values);
}
#endif

#define SLUICE_EXPORT_NORM(NAME, T)                                                                               \
    extern "C" void sluice_norm_##NAME(const T* x, const T* weight, T* out, int num_rows, int size, float eps,    \
                                       int num_threads) {                                                         \
        sluice::norm(x, weight, out, num_rows, size, eps, num_threads);                                           \
    }

SLUICE_EXPORT_NORM(float32, float)
SLUICE_EXPORT_NORM(bfloat16, sluice::bfloat16)

extern "C" int sluice_pair_width() { return 2 * sluice::W; }
