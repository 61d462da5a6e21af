// Threads that share out work: the one that calls, and helpers that take parts of it while they have a core. Nobody
// waits for a helper that has no part in hand: one whose core another program uses holds up nothing, where each of
// OpenMP's barriers would wait for it. So helpers leave their cores to whatever else wants them: the gateway's tokens
// are sent beside a step, not in its way.
#pragma once

#include <sched.h>
#include <semaphore.h>
#include <time.h>
#include <x86intrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <system_error>
#include <thread>

namespace sluice {

struct Range {
    int begin, end;
    int size() const { return end - begin; }
};

class Team {
public:
    static constexpr int MOST_PARTS = std::numeric_limits<uint16_t>::max();

    // Of the process, for one caller at a time. Never destroyed: its threads end with the process.
    static Team& of_process() {
        static Team* team = new Team;
        return *team;
    }

    // `work(part)` for the parts 0 .. count, by up to so many threads. All are done when it returns.
    template <class Work> void share(int count, int threads, Work& work) {
        if (threads <= 1 || count <= 1) {
            for (int part = 0; part < count; part++) work(part);
            return;
        }
        run = [](void* work, int part) { (*static_cast<Work*>(work))(part); };
        context = &work;
        done.store(0, std::memory_order_relaxed);
        Ticket ticket{++job, uint16_t(count), 0};
        open.store(ticket, std::memory_order_release);
        call(threads - 1);
        uint64_t own = 0;
        for (uint64_t before = __rdtsc(); take(); before += own) own = __rdtsc() - before;
        wait(count, own);
    }

private:
    // The work that is open, and the part of it that is taken next.
    struct Ticket {
        uint32_t job;
        uint16_t count, next;
    };
    static_assert(std::atomic<Ticket>::is_always_lock_free);

    // Has so many helpers awake. Fewer are no harm: whoever is there does the work.
    void call(int wanted) {
        if (num_helpers < std::min(wanted, most_helpers)) hire(wanted);
        int missing = std::min(wanted, num_helpers) - awake.load(std::memory_order_relaxed);
        for (; missing > 0; missing--) {
            awake.fetch_add(1, std::memory_order_relaxed);
            sem_post(&calls);
        }
    }

    void hire(int wanted) {
        try {
            for (; num_helpers < wanted; num_helpers++) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
            most_helpers = num_helpers;  // the system's limit
        }
    }

    // Does the next part, if one is left. `run` and `context` are what they were when it was taken, for the caller
    // waits until it is done.
    bool take() {
        Ticket ticket = open.load(std::memory_order_acquire);
        do {
            if (ticket.next >= ticket.count) return false;
        } while (!open.compare_exchange_weak(ticket, {ticket.job, ticket.count, uint16_t(ticket.next + 1)},
                                             std::memory_order_acquire));
        run(context, ticket.next);
        done.fetch_add(1, std::memory_order_release);
        return true;
    }

    // For the parts that helpers have in hand. One that takes much longer than this thread did for its last part has
    // lost its core to another program: it gets this one, by a nap.
    void wait(int count, uint64_t own) {
        constexpr uint64_t LEAST = 100'000;  // of the processor's ticks
        uint64_t patience = std::max(LEAST, 2 * own), since = __rdtsc();
        while (done.load(std::memory_order_acquire) < count) {
            if (__rdtsc() - since < patience) {
                _mm_pause();
            } else {
                timespec nap{0, 1};
                nanosleep(&nap, nullptr);
            }
        }
    }

    // Helpers offer their core now and then: a program that queues behind one, however much lower the priority here, is
    // looked at by the system at its next tick only, up to 4 ms later. A third of a millisecond is soon enough for a
    // client to get its tokens, and leaves the gateway those of several short steps to send at once.
    void help() {
        constexpr int SPINS = 1000;
        constexpr uint64_t TURN = 780'000;  // of the processor's ticks
        sched_param none{};
        sched_setscheduler(0, SCHED_IDLE, &none);  // where it is not allowed, they are as all others
        for (;;) {
            while (sem_wait(&calls)) continue;
            uint64_t offered = __rdtsc();
            for (int turns = 0; turns < SPINS; turns++) {
                if (take()) turns = 0;
                if (__rdtsc() - offered > TURN) sched_yield(), offered = __rdtsc();
                _mm_pause();
            }
            awake.fetch_sub(1, std::memory_order_relaxed);
        }
    }

    Team() { sem_init(&calls, 0, 0); }

    alignas(64) std::atomic<Ticket> open{Ticket{0, 0, 0}};
    alignas(64) std::atomic<int> done{0};
    alignas(64) std::atomic<int> awake{0};
    sem_t calls;
    void (*run)(void* work, int part) = nullptr;
    void* context = nullptr;
    uint32_t job = 0;
    int num_helpers = 0, most_helpers = std::numeric_limits<int>::max();
};

// `work(part)` on the parts of 0 .. count, of `size` each, by up to so many threads.
template <class Work> void share_out(int count, int size, int threads, Work work) {
    size = std::max(size, (count + Team::MOST_PARTS - 1) / Team::MOST_PARTS);
    auto of_part = [&](int part) { work(Range{part * size, std::min(count, (part + 1) * size)}); };
    Team::of_process().share((count + size - 1) / size, threads, of_part);
}

}  // namespace sluice
