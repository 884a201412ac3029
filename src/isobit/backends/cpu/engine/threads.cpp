#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace isobit {

namespace {

constexpr int SPINS_IN_PASS = 4000;     // some tens of microseconds
constexpr int SPINS_BETWEEN = 20000;    // the time in which the host samples a token
constexpr int MOST_MEMBERS = 2048;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

int TeamSize::members(Clock::time_point now) {
    if (members_ < most_ && now >= until_) {
        members_ = most_;
        took_ = waited_ = Duration(0);
    }
    return members_;
}

void TeamSize::ran(Clock::time_point now, Duration took, Duration waited) {
    if (members_ == 1) return;
    took_ += took;
    waited_ += waited;
    if (took_ < WINDOW) return;
    // Of the time of all but one thread, which is late: 1 where everything stands still.
    const double lost = (double)waited_.count() / ((double)took_.count() * (members_ - 1));
    const Duration guess = took_;
    took_ = waited_ = Duration(0);
    if (lost < std::max(0.25, 0.7 / members_)) {
        hold_ = std::max(hold_ / 2, 1);
        return;
    }
    members_ = std::max(1, std::min(members_ - 1, (int)(members_ * (1 - lost))));
    until_ = now + hold_ * guess;
    hold_ = std::min(hold_ * 2, LONGEST_HOLD);
}

Team::Team(int threads) : size_(threads < 1 ? 1 : threads), process_(getpid()), team_size_(size_) {
    // More threads than cores must not spin: the one waited for may need this core.
    bool crowded = size_ > (int)std::thread::hardware_concurrency();
    spins_ = crowded ? 0 : 1;
    try {
        threads_.reserve(size_);
        for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& refused) {
        int started = 1 + (int)threads_.size();
        end();  // no destructor does it for an object that was not made
        throw std::runtime_error("threads: expected " + std::to_string(size_) +
                                 ", the system started " + std::to_string(started) + " (" +
                                 refused.code().message() + "); ask for fewer");
    }
}

Team::~Team() { end(); }

void Team::end() {
    if (getpid() != process_) {  // of a fork, which has no such threads to wait for
        for (std::thread& t : threads_) t.detach();
        return;
    }
    runs_.store(-1);
    runs_.notify_all();
    for (std::thread& t : threads_) t.join();
}

template <class T>
bool Team::spin_while(std::atomic<T>& value, T old, int spins) {
    for (int i = spins * spins_; i > 0; --i) {
        if (value.load(std::memory_order_acquire) != old) return true;
        pause();
    }
    return false;
}

template <class T>
void Team::sleep_while(std::atomic<T>& value, T old) {
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void Team::run(const std::function<void(int)>& body) {
    FloatMode mode;
    body_ = &body;
    if (size_ == 1) {
        body(0);
        return barrier();
    }
    const TeamSize::Clock::time_point start = TeamSize::Clock::now();
    if (getpid() == process_) {
        members_ = team_size_.members(start);
    } else {  // in a fork, perhaps of the midst of a run
        members_ = 1;
        arrived_ = next_ = 0;
    }
    waited_ = 0;
    if (members_ > 1) {
        runs_.store(((runs_.load() / MOST_MEMBERS + 1) & 0xfffff) * MOST_MEMBERS + members_);
        runs_.notify_all();
    }
    body(0);
    barrier();
    const TeamSize::Clock::time_point end = TeamSize::Clock::now();
    team_size_.ran(end, end - start, TeamSize::Duration(waited_.load()));
}

void Team::work(int thread) {
    FloatMode mode;
    for (int seen = 0;;) {
        if (!spin_while(runs_, seen, SPINS_BETWEEN)) sleep_while(runs_, seen);
        seen = runs_.load(std::memory_order_acquire);
        if (seen < 0) return;
        if (thread >= seen % MOST_MEMBERS) continue;  // members_ may be the next run's already
        (*body_)(thread);
        barrier();
    }
}

void Team::wait(unsigned epoch) {
    if (!watched_) return wait_unwatched(epoch);
    const TeamSize::Clock::time_point start = TeamSize::Clock::now();
    wait_unwatched(epoch);
    stood_.fetch_add((TeamSize::Clock::now() - start).count(), std::memory_order_relaxed);
}

void Team::wait_unwatched(unsigned epoch) {
    if (spin_while(epoch_, epoch, SPINS_IN_PASS)) return;
    const TeamSize::Clock::time_point start = TeamSize::Clock::now();
    sleep_while(epoch_, epoch);
    waited_.fetch_add((TeamSize::Clock::now() - start).count(), std::memory_order_relaxed);
}

void Team::release(unsigned epoch) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    epoch_.store(epoch + 1, std::memory_order_release);
    epoch_.notify_all();
}

#if defined(__x86_64__)
FloatMode::FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatMode::~FloatMode() { _mm_setcsr((unsigned)saved_); }
#elif defined(__aarch64__)
FloatMode::FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(0ull));
}
FloatMode::~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
FloatMode::FloatMode() : saved_(0) {}
FloatMode::~FloatMode() {}
#endif

}  // namespace isobit
