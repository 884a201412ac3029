// What the parts of a split model, each a process, share: memory through which they give each other
// their pieces of values.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#include <atomic>

namespace isobit {

// The memory: a line for each part (how many pieces it has given), one that says whether a part has
// ended, then two buffers with room for a piece of every part, used in turn. A part that gives piece
// n + 2 has seen all pieces n + 1, so everyone has read the pieces n, which lay where it writes.
class Exchange {
public:
    static constexpr size_t LINE = 64;

    Exchange(uint8_t* memory, size_t bytes, int rank, int parts)
        : rank(rank), parts(parts), memory_(memory), parent_(getppid()),
          room_((bytes - (parts + 1) * LINE) / (2 * parts * sizeof(float))) {}

    // Values that fit into a piece.
    size_t room() const { return room_; }

    // The piece of a part in the current exchange.
    float* piece(int part) const {
        return (float*)(memory_ + (parts + 1) * LINE) + ((given_ % 2) * parts + part) * room_;
    }

    // This part's piece is written: waits until everyone's is. False: a part has ended.
    bool meet() {
        count(rank).store(given_ + 1, std::memory_order_release);
        for (int p = 0; p < parts; ++p)
            for (int spins = 0; count(p).load(std::memory_order_acquire) <= given_; ++spins) {
                if (count(parts).load(std::memory_order_relaxed)) return false;
                if (spins > 2000) sched_yield();  // there may be fewer cores than parts
                if (spins % 4096 == 4095 && getppid() != parent_) return false;
            }
        return true;
    }

    // All pieces are read.
    void next() { ++given_; }

    const int rank, parts;
    bool broken = false;  // a part has ended; what was made since is void

private:
    std::atomic<uint64_t>& count(int line) const {
        return *(std::atomic<uint64_t>*)(memory_ + line * LINE);
    }

    uint8_t* memory_;
    const pid_t parent_;
    const size_t room_;
    uint64_t given_ = 0;
};

}  // namespace isobit
