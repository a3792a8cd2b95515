#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>

namespace kn {
namespace {

// The gate of the current job:   bit 31 open | bit 30 the caller sleeps | bits 0..29 workers inside
// A worker that wakes too late finds the gate closed: the caller never waits for a thread that did not start.
constexpr uint32_t kOpen = 1u << 31;
constexpr uint32_t kCallerSleeps = 1u << 30;
constexpr uint32_t kInside = kCallerSleeps - 1;

// Longer than the serial gaps between the parallel parts of a layer, far below what an HTTP thread would
// notice.
constexpr auto kSpin = std::chrono::microseconds(40);

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int count) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// True as soon as done() holds, false when the spinning time is over.
template <class Done>
bool spin_until(const Done& done) {
    if (done()) return true;
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            _mm_pause();
            if (done()) return true;
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
}

}  // namespace

Pool::Pool(int threads) : threads_(std::max(threads, 1)) {
    workers_.reserve(threads_ - 1);
    for (int worker = 1; worker < threads_; ++worker) {
        workers_.emplace_back([this, worker] { worker_loop(worker); });
        char name[16];  // Linux cuts thread names at 15 characters
        std::snprintf(name, sizeof name, "kn-worker-%d", worker % 10000);
        pthread_setname_np(workers_.back().native_handle(), name);
    }
}

Pool::~Pool() {
    stop_.store(true);
    generation_.fetch_add(1);
    futex_wake(generation_, INT_MAX);
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    gate_.store(kOpen, std::memory_order_release);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake(generation_, INT_MAX);
    take_chunks(0);
    close_and_wait();
}

void Pool::take_chunks(int worker) {
    const Job job = job_;
    for (;;) {
        const int64_t begin = next_.fetch_add(job.chunk, std::memory_order_relaxed);
        if (begin >= job.items) return;
        job.invoke(job.body, begin, std::min(begin + job.chunk, job.items), worker);
    }
}

void Pool::close_and_wait() {
    gate_.fetch_and(~kOpen);
    if (spin_until([this] { return gate_.load(std::memory_order_acquire) == 0; })) return;
    uint32_t gate = gate_.fetch_or(kCallerSleeps) | kCallerSleeps;
    while ((gate & kInside) != 0) {
        futex_wait(gate_, gate);
        gate = gate_.load(std::memory_order_acquire);
    }
}

bool Pool::join_job() {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    while ((gate & kOpen) != 0) {
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
}

void Pool::leave_job() {
    const uint32_t before = gate_.fetch_sub(1, std::memory_order_acq_rel);
    if (before == (kCallerSleeps | 1)) futex_wake(gate_, 1);
}

void Pool::worker_loop(int worker) {
    uint32_t seen = 0;
    for (;;) {
        seen = wait_for_job(seen);
        if (stop_.load()) return;
        if (join_job()) {
            take_chunks(worker);
            leave_job();
        }
    }
}

uint32_t Pool::wait_for_job(uint32_t seen) {
    const auto changed = [this, seen] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!spin_until(changed)) {
        // Before the last look inside futex_wait: either run() sees it or we see the job.
        sleepers_.fetch_add(1);
        while (!changed()) futex_wait(generation_, seen);
        sleepers_.fetch_sub(1);
    }
    return generation_.load(std::memory_order_acquire);
}

}  // namespace kn
