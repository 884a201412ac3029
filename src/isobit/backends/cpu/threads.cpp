#include "threads.h"

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

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Team::Team(int threads) : size_(threads < 1 ? 1 : threads) {
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
    runs_.store(-1);
    runs_.notify_all();
    for (std::thread& t : threads_) t.join();
}

template <class T>
void Team::wait_while(std::atomic<T>& value, T old, int spins) {
    for (int i = spins * spins_; i > 0; --i) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void Team::run(const std::function<void(int)>& body) {
    FloatMode mode;
    body_ = &body;
    if (size_ > 1) {
        runs_.store((runs_.load() + 1) & 0x7fffffff);
        runs_.notify_all();
    }
    body(0);
    barrier();
}

void Team::work(int thread) {
    FloatMode mode;
    for (int seen = 0;;) {
        wait_while(runs_, seen, SPINS_BETWEEN);
        seen = runs_.load(std::memory_order_acquire);
        if (seen < 0) return;
        (*body_)(thread);
        barrier();
    }
}

void Team::wait(unsigned epoch) { wait_while(epoch_, epoch, SPINS_IN_PASS); }

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
