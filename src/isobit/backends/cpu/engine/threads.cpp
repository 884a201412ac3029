#include "threads.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace isobit {

namespace {

constexpr int SPINS_IN_PASS = 4000;     // some tens of microseconds
constexpr int SPINS_BETWEEN = 20000;    // the time in which the host samples a token
constexpr int MOST_MEMBERS = 2048;

thread_local int64_t pauses = 0;  // of this thread in all

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

TeamSize::Duration processor_time() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

// Processor time of a thread from here on, without its pauses.
class Busy {
public:
    TeamSize::Duration::rep so_far() const {
        return (processor_time() - start_).count() - (int64_t)((pauses - pauses_) * PAUSE);
    }

private:
    const TeamSize::Duration start_ = processor_time();
    const int64_t pauses_ = pauses;

    static inline const double PAUSE = [] {  // nanoseconds
        constexpr int MANY = 1000;
        std::atomic<int> value = 0;
        const TeamSize::Duration start = processor_time();
        for (int i = 0; i < MANY && value.load(std::memory_order_acquire) == 0; ++i) pause();
        return (double)(processor_time() - start).count() / MANY;
    }();
};

// Work that differs by less than a quarter is of one kind.
constexpr int KINDS = 4 * 31;
int kind_of(int work) {
    const unsigned n = std::max(work, 1), width = std::bit_width(n);
    return 4 * (width - 1) + (width > 2 ? n >> (width - 3) & 3 : n << (3 - width) & 3);
}

}  // namespace

// The number to try next; kept_ if there is none.
int TeamSize::other() const {
    const int step = std::max(kept_ / 4, 1);
    const int more = std::min(kept_ + step, most_), fewer = std::max(kept_ - step, 1);
    return more == kept_ || (fewer != kept_ && !more_) ? fewer : more;
}

void TeamSize::ran(Duration took, Duration busy, double work) {
    took_ += took;
    busy_ += busy;
    work_ += work;
    if (took_ < WINDOW) return;
    const Duration window = took_;
    const double speed = work_ / (double)window.count();
    const bool waits = busy_ < AT_WORK * members_ * window;
    took_ = busy_ = Duration(0);
    work_ = 0;
    if (std::exchange(first_, false) && !waits) return;  // it read what was never read before
    if (members_ == kept_) {
        if (speed_ == 0) left_ = FIRST_HOLD * window;
        if (kept_ > 1 && (speed < SUDDEN * speed_ || (waits && !tried_))) left_ = Duration(0);
        speed_ += (speed - speed_) * (speed_ > 0 ? 0.25 : 1);
        left_ -= window;
        if (left_ <= Duration(0)) members_ = other();
        return;
    }
    tried_ = true;
    const bool more = members_ > kept_;
    if (speed > speed_ * (more ? WORTH_MORE : 1)) {
        more_ = more;
        kept_ = members_;
        speed_ = speed;
        std::swap(hold_, held_);
    } else {
        more_ = !more;
        members_ = kept_;
        hold_ = std::min(hold_ * 4, LONGEST_HOLD);
        held_ = SHORTEST_HOLD;
    }
    left_ = hold_ * window;
}

Team::Team(int threads) : size_(threads < 1 ? 1 : threads), process_(getpid()), sizes_(KINDS, TeamSize(size_)) {
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
    int i = spins * spins_;
    for (; i > 0 && value.load(std::memory_order_acquire) == old; --i) pause();
    pauses += spins * spins_ - i;
    return i > 0;
}

template <class T>
void Team::sleep_while(std::atomic<T>& value, T old) {
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void Team::run(int work, const std::function<void(int)>& body) {
    FloatMode mode;
    body_ = &body;
    if (size_ == 1) {
        body(0);
        return barrier();
    }
    const auto start = std::chrono::steady_clock::now();
    TeamSize& size = sizes_[kind_of(work)];
    if (getpid() == process_) {
        members_ = size.members();
    } else {  // in a fork, perhaps of the midst of a run
        members_ = 1;
        arrived_ = next_ = 0;
    }
    busy_ = 0;
    if (members_ > 1) {
        runs_.store(((runs_.load() / MOST_MEMBERS + 1) & 0xfffff) * MOST_MEMBERS + members_);
        runs_.notify_all();
    }
    const Busy busy;
    body(0);
    barrier();
    size.ran(std::chrono::steady_clock::now() - start,
             TeamSize::Duration(busy_.load() + busy.so_far()), work);
}

void Team::work(int thread) {
    FloatMode mode;
    for (int seen = 0;;) {
        if (!spin_while(runs_, seen, SPINS_BETWEEN)) sleep_while(runs_, seen);
        seen = runs_.load(std::memory_order_acquire);
        if (seen < 0) return;
        if (thread >= seen % MOST_MEMBERS) continue;  // members_ may be the next run's already
        const Busy busy;
        (*body_)(thread);
        busy_.fetch_add(busy.so_far(), std::memory_order_relaxed);
        barrier();
    }
}

void Team::wait(unsigned epoch) {
    if (!watched_.load(std::memory_order_relaxed)) return wait_unwatched(epoch);
    const auto start = std::chrono::steady_clock::now();
    wait_unwatched(epoch);
    const TeamSize::Duration took = std::chrono::steady_clock::now() - start;
    stood_.fetch_add(took.count(), std::memory_order_relaxed);
}

void Team::wait_unwatched(unsigned epoch) {
    if (!spin_while(epoch_, epoch, SPINS_IN_PASS)) sleep_while(epoch_, epoch);
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
