// Sums over the tensor-parallel ranks of one machine, in the memory and the order of engines/runtime/shared_memory.py,
// whose operations these are: where that says it more fully.
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <time.h>

#include "vec.h"

namespace sluice {

struct Ranks {
    int64_t* counters;  // LINE apart
    char* halves;       // [2, size, capacity]
    int64_t capacity;   // bytes of one rank's part
    int64_t operation;  // the last one
    int32_t rank, size;
    double timeout;  // seconds

    static constexpr int LINE = 8;  // counters in a cache line of their own

    template <class T> T* part(int64_t operation, int of) const {
        return reinterpret_cast<T*>(halves + (operation % 2 * size + of) * capacity);
    }
};

// Until all ranks have come to an operation: spins, then yields the core, then sleeps in short naps. False if one does
// not come in time.
inline bool wait_for(const Ranks& ranks, int64_t operation) {
    constexpr int64_t SPINS = 5000, YIELDS = 2000, NAP = 100'000;  // ns
    for (int rank = 0; rank < ranks.size; rank++) {
        const int64_t* counter = ranks.counters + rank * Ranks::LINE;
        for (int64_t turns = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < operation; turns++) {
            if (turns < SPINS) {
                _mm_pause();
            } else if (turns < SPINS + YIELDS) {
                sched_yield();
            } else {
                timespec nap{0, NAP};
                nanosleep(&nap, nullptr);
                if (double(turns - SPINS - YIELDS) * NAP * 1e-9 > ranks.timeout) return false;
            }
        }
    }
    return true;
}

// This rank's part is written: tells the others, and waits for theirs.
inline bool meet(const Ranks& ranks, int64_t operation) {
    __atomic_store_n(ranks.counters + ranks.rank * Ranks::LINE, operation, __ATOMIC_RELEASE);
    return wait_for(ranks, operation);
}

// Adds the ranks' parts of a row, in order of rank: the same sum on all of them.
template <class T> void add_parts(const Ranks& ranks, int64_t operation, int64_t row, int size, T* to) {
    for (int n = 0; n < size; n += W) {
        vfloat sum = consecutive(ranks.part<T>(operation, 0) + row * size + n);
        for (int rank = 1; rank < ranks.size; rank++) {
            sum += consecutive(ranks.part<T>(operation, rank) + row * size + n);
        }
        put_consecutive(to + n, consecutive(to + n) + rounded<T>(sum));
    }
}

}  // namespace sluice
