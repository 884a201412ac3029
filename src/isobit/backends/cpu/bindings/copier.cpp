// Copies of parts of a file by threads that do not need Python's lock: whoever loads a model only says what is to
// be copied, and waits for it.

#include "module.h"

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;  // they may lie apart

class Copier {
public:
    explicit Copier(int threads) {
        try {
            while ((int)threads_.size() < threads) threads_.emplace_back([this] { run(); });
        } catch (const std::system_error&) {  // the system has no more: those that there are
        }
    }
    ~Copier() { close(); }

    // Returns the number to wait for. Both arrays are the caller's until then.
    int64_t begin(const Array<uint8_t, 1>& to, const Rows& from) {
        const size_t rows = from.shape(0), bytes = from.shape(1);
        require(to.size() == rows * bytes, "Copier: expected as many bytes as are copied");
        require(bytes < 2 || from.stride(1) == 1, "Copier: expected rows in one piece each");
        const Part part{to.data(), from.data(), rows, bytes, from.stride(0)};
        const bool here = threads_.empty();
        if (here) part.copy();
        std::lock_guard lock(mutex_);
        parts_.push_back(part);
        parts_.back().done = here;
        work_.notify_one();
        return first_ + (int64_t)parts_.size() - 1;
    }
    void wait(int64_t number) {
        nb::gil_scoped_release release;
        std::unique_lock lock(mutex_);
        require(number < first_ + (int64_t)parts_.size(), "Copier: no such copy");
        done_.wait(lock, [&] { return number < first_ || at(number).done; });
        for (; !parts_.empty() && parts_.front().done; ++first_) parts_.pop_front();
    }
    // What has not begun is not copied any more.
    void close() {
        {
            std::lock_guard lock(mutex_);
            closed_ = true;
            work_.notify_all();
        }
        for (std::thread& t : threads_) t.join();
        threads_.clear();
    }

private:
    struct Part {
        uint8_t* to;
        const uint8_t* from;
        size_t rows, bytes;
        int64_t stride;
        bool done = false;

        void copy() const {
            for (size_t r = 0; r < rows; ++r)
                memcpy(to + r * bytes, from + (int64_t)r * stride, bytes);
        }
    };

    Part& at(int64_t number) { return parts_[number - first_]; }

    void run() {
        std::unique_lock lock(mutex_);
        for (;;) {
            work_.wait(lock, [&] { return closed_ || next_ < first_ + (int64_t)parts_.size(); });
            if (closed_) return;
            const int64_t mine = next_++;
            const Part part = at(mine);
            lock.unlock();
            part.copy();
            lock.lock();
            at(mine).done = true;
            done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::deque<Part> parts_;        // all before these are done
    int64_t first_ = 0, next_ = 0;  // numbers: of the first of these, and of what is copied next
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

void bind_copier(nb::module_& m) {
    nb::class_<Copier>(m, "Copier")
        .def(nb::init<int>())
        .def("begin", &Copier::begin, nb::arg().noconvert(), nb::arg().noconvert())
        .def("wait", &Copier::wait)
        .def("close", &Copier::close, nb::call_guard<nb::gil_scoped_release>());
}
