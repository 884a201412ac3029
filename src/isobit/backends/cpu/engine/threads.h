// A team of threads that runs one function together and meets at barriers inside it. Threads wait
// by spinning for a short while, so that steps of a few microseconds follow one another at once,
// then by sleeping.
//
// One thread that is not scheduled holds all of them up at a barrier. Beside busy neighbours a team
// can so become many times slower than one thread; it then goes on with fewer for a while (TeamSize).
// In the child of a fork there are no other threads, and the one that there is runs everything.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace isobit {

// How many threads to run with, from how long they have waited for one another.
class TeamSize {
public:
    using Clock = std::chrono::steady_clock;
    using Duration = Clock::duration;

    explicit TeamSize(int most) : most_(most), members_(most) {}

    int members(Clock::time_point now);

    // A run has ended that took so long; its threads waited so long in all, spinning not counted.
    void ran(Clock::time_point now, Duration took, Duration waited);

private:
    const int most_;
    int members_;
    Duration took_{0}, waited_{0};  // since the number was last judged
    int hold_ = 1;  // how long it stays lowered, in times of what was lost
    Clock::time_point until_{};

    // A trial costs one run and at least a WINDOW. The number is raised again soon after a moment in
    // which another program ran; of many wrong trials one after the other, each costs less than a
    // per cent of the time that is held after it.
    static constexpr Duration WINDOW = std::chrono::milliseconds(10);
    static constexpr int LONGEST_HOLD = 128;
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
    TeamSize team_size_;
    std::atomic<TeamSize::Duration::rep> waited_{0};  // in this run
    int spins_;
    bool watched_ = false;
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
