// One pool of threads for everything a context computes. The calling thread is worker 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace kn {

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Calls body(begin, end, worker) on disjoint ranges that cover [0, items), at most `chunk` items each,
    // handed out as threads come for them. Returns when all are done. Not reentrant.
    template <class Body>
    void parallel_for(int64_t items, int64_t chunk, const Body& body) {
        if (items <= 0) return;
        if (threads_ == 1 || items <= chunk) {
            body(int64_t{0}, items, 0);
            return;
        }
        run({[](const void* context, int64_t begin, int64_t end, int worker) {
                 (*static_cast<const Body*>(context))(begin, end, worker);
             },
             &body, items, chunk});
    }

  private:
    struct Job {
        void (*invoke)(const void*, int64_t, int64_t, int);
        const void* body;
        int64_t items;
        int64_t chunk;
    };

    void run(const Job& job);
    void take_chunks(int worker);
    void close_and_wait();
    bool join_job();
    void leave_job();
    void worker_loop(int worker);
    uint32_t wait_for_job(uint32_t seen);

    const int threads_;
    Job job_{};
    // Each word has its own cache line: the workers hammer on them.
    alignas(64) std::atomic<uint32_t> generation_{0};  // one more per job; idle workers sleep on it
    alignas(64) std::atomic<uint32_t> gate_{0};        // open bit, waiting bit, number of workers inside
    alignas(64) std::atomic<int64_t> next_{0};         // first item that nobody took
    alignas(64) std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace kn
