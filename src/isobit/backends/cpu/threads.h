// A team of threads that runs one function together and meets at barriers inside it. Threads wait
// by spinning for a short while, so that steps of a few microseconds follow one another at once,
// then by sleeping.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace isobit {

class Team {
public:
    explicit Team(int threads);  // throws std::runtime_error if the system refuses one
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Runs body(thread) on every thread, 0 being the caller's; returns when all are done.
    void run(const std::function<void(int)>& body);

    // Inside run, called by every thread alike:
    void barrier() {
        barrier([] {});
    }

    // The last thread to arrive calls then() before any goes on.
    template <class F>
    void barrier(F&& then) {
        const unsigned epoch = epoch_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) < size_ - 1) return wait(epoch);
        then();
        release(epoch);
    }

    // f(i) for each i < n, whichever thread is free; then a barrier.
    template <class F>
    void each(int n, F&& f) {
        each(n, f, [] {});
    }
    template <class F, class G>
    void each(int n, F&& f, G&& then) {
        for (int i = take(); i < n; i = take()) f(i);
        barrier(then);
    }

    // f(i, next), next being what this thread does after i (n or more: nothing).
    template <class F>
    void each_and_next(int n, F&& f) {
        for (int i = take(), next; i < n; i = next) f(i, next = take());
        barrier();
    }

private:
    int take() { return next_.fetch_add(1, std::memory_order_relaxed); }
    void work(int thread);
    void end();
    void wait(unsigned epoch);
    void release(unsigned epoch);
    template <class T>
    void wait_while(std::atomic<T>& value, T old, int spins);

    const int size_;
    int spins_;
    alignas(64) std::atomic<int> next_{0};     // the next index of each()
    alignas(64) std::atomic<int> arrived_{0};  // threads at the barrier
    alignas(64) std::atomic<unsigned> epoch_{0};  // barriers passed
    alignas(64) std::atomic<int> runs_{0};     // calls of run(), or -1 to end
    const std::function<void(int)>* body_ = nullptr;
    std::vector<std::thread> threads_;
};

// Floating point as the specification wants it (nearest even, subnormals kept) for this scope and
// thread, whatever another library has set.
class FloatMode {
public:
    FloatMode();
    ~FloatMode();

private:
    unsigned long long saved_;
};

}  // namespace isobit
