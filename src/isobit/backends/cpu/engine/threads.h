// A team of threads that runs one function together and meets at barriers inside it. Threads wait
// by spinning for a short while, so that steps of a few microseconds follow one another at once,
// then by sleeping.
//
// One thread that is not scheduled holds all of them up at a barrier. Beside busy neighbours a team
// can so become many times slower than one thread; which number is the fastest is tried (TeamSize).
// In the child of a fork there are no other threads, and the one that there is runs everything.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace isobit {

// How many threads to run with, of work of one kind: what is done the fastest. A number is kept while
// a quarter more or fewer is tried now and then, for a moment. That threads hardly wait for one another
// does not say that fewer would be slower: they may hinder each other at the memory.
class TeamSize {
public:
    using Duration = std::chrono::nanoseconds;

    explicit TeamSize(int most) : most_(most), members_(most), kept_(most) {}

    int members() const { return members_; }  // of the next run

    // A run has ended that did so much work and took so long; its threads were at it for so long in
    // all, by their processor time, waiting not counted.
    void ran(Duration took, Duration busy, double work);

private:
    int other() const;

    const int most_;
    int members_;  // other than kept_ in a trial
    int kept_;
    double speed_ = 0;  // of kept_: work in a tick; 0: not known yet
    Duration took_{0}, busy_{0};  // of the runs since the last judgement
    double work_ = 0;
    bool first_ = true;
    bool more_ = false, tried_ = false;  // what is tried next, if it can be; whether anything was

    // Threads have their turn on a busy processor every few milliseconds. Of many trials that fail
    // one after the other, each costs less than a per cent of the time until the next; after a
    // moment in which another program ran the next one comes soon.
    static constexpr Duration WINDOW = std::chrono::milliseconds(15);
    static constexpr int SHORTEST_HOLD = 4, LONGEST_HOLD = 128;  // times a trial
    static constexpr int FIRST_HOLD = 16;       // unless threads wait much from the beginning
    static constexpr double AT_WORK = 0.75;     // of threads that do not wait much
    static constexpr double WORTH_MORE = 1.05;  // times as fast
    static constexpr double SUDDEN = 0.7;       // of its speed: something else has begun to run

    int hold_ = SHORTEST_HOLD;  // how long until the next trial, in times of the last one
    int held_ = SHORTEST_HOLD;  // the same of the number before, should this one prove the slower
    Duration left_{0};          // of that time
};

class Team {
public:
    explicit Team(int threads);  // throws std::runtime_error if the system refuses one
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }
    int members() const { return members_; }  // of them those that run now

    // How long threads have stood at barriers, all of them together, since watch().
    void watch() { watched_ = true; }
    TeamSize::Duration stood() const { return TeamSize::Duration(stood_.load()); }

    // Runs body(thread) on every thread, 0 being the caller's; returns when all are done. Twice the
    // work, in tokens or rows, takes about twice as long.
    void run(int work, const std::function<void(int)>& body);

    // Inside run, called by every thread alike:
    void barrier() {
        barrier([] {});
    }

    // The last thread to arrive calls then() before any goes on.
    template <class F>
    void barrier(F&& then) {
        const unsigned epoch = epoch_.load(std::memory_order_relaxed);
        const int last = members_ - 1;  // read now: once all have arrived, the next run may set it
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) < last) return wait(epoch);
        then();
        release(epoch);
    }

    // f(i) for each i < n, whichever thread is free; then a barrier.
    template <class F>
    void parallel_for(int n, F&& f) {
        parallel_for(n, f, [] {});
    }
    template <class F, class G>
    void parallel_for(int n, F&& f, G&& then) {
        for (int i = claim(); i < n; i = claim()) f(i);
        barrier(then);
    }

    // f(i, next), next being what this thread does after i (n or more: nothing).
    template <class F>
    void parallel_for_with_prefetch(int n, F&& f) {
        for (int i = claim(), next; i < n; i = next) f(i, next = claim());
        barrier();
    }

private:
    int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }
    void work(int thread);
    void end();
    void wait(unsigned epoch);
    void wait_unwatched(unsigned epoch);
    void release(unsigned epoch);
    template <class T>
    bool spin_while(std::atomic<T>& value, T old, int spins);
    template <class T>
    void sleep_while(std::atomic<T>& value, T old);

    const int size_;
    const pid_t process_;
    int members_ = 1;  // threads of this run, the first ones
    std::vector<TeamSize> sizes_;  // by how much work there is
    std::atomic<TeamSize::Duration::rep> busy_{0};  // processor time of this run
    int spins_;
    std::atomic<bool> watched_ = false;  // threads may still be leaving a run's last barrier
    std::atomic<TeamSize::Duration::rep> stood_{0};
    alignas(64) std::atomic<int> next_{0};     // the next index of parallel_for()
    alignas(64) std::atomic<int> arrived_{0};  // threads at the barrier
    alignas(64) std::atomic<unsigned> epoch_{0};  // barriers passed
    alignas(64) std::atomic<int> runs_{0};     // calls of run() and their members, or -1 to end
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
