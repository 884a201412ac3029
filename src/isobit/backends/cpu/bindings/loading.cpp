// Parts of a file on their way into a GPU's memory, by threads that do not need Python's lock: whoever loads a model
// says what is to be brought where, and goes on.

#include "module.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

namespace {

using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;  // they may lie apart

// The driver's functions, in this order by their addresses. Each returns 0, or an error.
struct Driver {
    int (*set_context)(void*);
    int (*host_alloc)(void**, size_t, unsigned);
    int (*host_free)(void*);
    int (*alloc)(uint64_t*, size_t);
    int (*free)(uint64_t);
    int (*event_create)(void**, unsigned);
    int (*event_record)(void*, void*);
    int (*event_wait)(void*);
    int (*event_destroy)(void*);
    int (*upload)(uint64_t, const void*, size_t, void*);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
};
constexpr size_t FUNCTIONS = 11;
static_assert(sizeof(Driver) == FUNCTIONS * sizeof(void*));
constexpr unsigned NO_TIMING = 2, MOST_BLOCKS = 1 << 16, THREADS = 256;
constexpr int TILE_ROWS = 8;

class Loading {
public:
    // Addresses of the driver's functions, the context, the stream and repack.cu's kernel; what a thread may hold in
    // staging; parts: rows, where they go, and if they are repacked the superblocks of a row and the bytes of one.
    Loading(const std::array<size_t, FUNCTIONS>& driver, size_t context, size_t stream, size_t repack, int threads,
            size_t staging, const std::vector<std::tuple<Rows, uint64_t, int, int>>& parts)
        : context_((void*)context), stream_((void*)stream), repack_((void*)repack), staging_(staging) {
        memcpy(&driver_, driver.data(), sizeof driver_);
        for (const auto& [rows, to, supers, super_bytes] : parts) {
            require(rows.shape(1) < 2 || rows.stride(1) == 1, "Loading: expected rows in one piece each");
            require(rows.size() <= staging, "Loading: expected parts that fit the staging buffer");
            require(supers >= 0 && super_bytes >= 0 && !supers == !super_bytes, "Loading: supers and their bytes");
            parts_.push_back({rows, to, supers, super_bytes});
        }
        slots_.resize(std::max(threads, 1));
        for (Slot& slot : slots_) {
            running_ += 1;
            try {
                threads_.emplace_back([this, &slot] {
                    run(slot);
                    running_ -= 1;
                    std::lock_guard lock(mutex_);
                    ended_.notify_all();
                });
            } catch (const std::system_error&) {  // the system has no more: those that there are
                running_ -= 1;
                break;
            }
        }
    }
    ~Loading() { stop(); }

    // Once all is on the device: 0, or the driver's first error. Nothing if that takes longer than so many seconds. In
    // a thread whose context is this one.
    std::optional<int> wait(double seconds) {
        if (threads_.empty() && !done_) run(slots_[0]);
        {
            std::unique_lock lock(mutex_);
            if (!ended_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return running_ == 0; })) return {};
        }
        join();
        for (Slot& slot : slots_) {
            if (slot.event) check(driver_.event_destroy(slot.event));
            if (slot.device) check(driver_.free(slot.device));
            if (slot.host) check(driver_.host_free(slot.host));
            slot = {};
        }
        return error_;
    }
    // What has not begun is not brought any more.
    void stop() {
        stopped_ = true;
        join();
    }

private:
    struct Part {
        Rows rows;
        uint64_t to;
        int supers, super_bytes;

        void copy(uint8_t* out) const {
            const size_t bytes = rows.shape(1);
            for (size_t r = 0; r < rows.shape(0); ++r)
                memcpy(out + r * bytes, rows.data() + (int64_t)r * rows.stride(0), bytes);
        }
    };
    struct Slot {
        void* host = nullptr;  // page-locked
        uint64_t device = 0;
        void* event = nullptr;
    };

    bool check(int result) {
        int none = 0;
        if (result) error_.compare_exchange_strong(none, result);
        return !result;
    }
    void join() {
        for (std::thread& t : threads_) t.join();
        threads_.clear();
        done_ = true;
    }
    void run(Slot& slot) {
        bool queued = false;
        if (!check(driver_.set_context(context_)) || !check(driver_.host_alloc(&slot.host, staging_, 0)) ||
            !check(driver_.alloc(&slot.device, staging_)) || !check(driver_.event_create(&slot.event, NO_TIMING)))
            return;
        while (!stopped_ && !error_) {
            const size_t mine = next_++;
            if (mine >= parts_.size() || (queued && !check(driver_.event_wait(slot.event)))) break;
            parts_[mine].copy((uint8_t*)slot.host);
            if (!queue(parts_[mine], slot)) return;
            queued = true;
        }
        if (queued) check(driver_.event_wait(slot.event));
    }
    bool queue(const Part& part, const Slot& slot) {
        const size_t bytes = part.rows.size();
        if (!check(driver_.upload(part.supers ? slot.device : part.to, slot.host, bytes, stream_))) return false;
        if (part.supers) {
            uint64_t from = slot.device, to = part.to;
            int64_t tiles = (int64_t)(bytes / ((size_t)TILE_ROWS * part.super_bytes));
            int supers = part.supers, super_bytes = part.super_bytes;
            void* arguments[] = {&from, &tiles, &supers, &super_bytes, &to};
            const unsigned blocks = (unsigned)std::min<int64_t>(tiles, MOST_BLOCKS);
            if (!check(driver_.launch(repack_, blocks, 1, 1, THREADS, 1, 1, 0, stream_, arguments, nullptr)))
                return false;
        }
        return check(driver_.event_record(slot.event, stream_));
    }

    Driver driver_;
    void *context_, *stream_, *repack_;
    size_t staging_;
    std::vector<Part> parts_;
    std::vector<Slot> slots_;
    std::atomic<size_t> next_ = 0;
    std::atomic<int> error_ = 0;
    std::atomic<bool> stopped_ = false;
    std::atomic<int> running_ = 0;
    std::mutex mutex_;
    std::condition_variable ended_;
    bool done_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

void bind_loading(nb::module_& m) {
    nb::class_<Loading>(m, "Loading")
        .def(nb::init<const std::array<size_t, FUNCTIONS>&, size_t, size_t, size_t, int, size_t,
                      const std::vector<std::tuple<Rows, uint64_t, int, int>>&>())
        .def("wait", &Loading::wait, nb::call_guard<nb::gil_scoped_release>())
        .def("stop", &Loading::stop, nb::call_guard<nb::gil_scoped_release>());
}
