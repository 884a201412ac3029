// Values of a split model that come to lie in every part's inbox as a whole: whoever makes some of them stores them
// in its own and, at the same place, in the others'; once all parts have met (meet.cu), all is there. Half as many
// bytes as words with numbers (exchange.cuh), for large passes. They lie behind the flags of an inbox.
#pragma once
#include "common.cuh"

// What the host tells of a program's exchanges (parts.py), and how many there were.
template <int PARTS>
struct ExchangeTable {
    uint64 inbox[PARTS];  // of each part
    int* flags;           // Patience
    int64 half;           // words
    int64 rank;           // this part
    uint32 count;
};

#ifdef MIRRORED  // so many parts
struct Mirrors {
    int64 to[MIRRORED];  // bytes from this part's inbox to each

    DEV Mirrors(const uint64* host) {
        auto table = (const ExchangeTable<MIRRORED>*)host;
#pragma unroll
        for (int part = 0; part < MIRRORED; part++) to[part] = table->inbox[part] - table->inbox[table->rank];
    }
    template <class T>
    DEV void store(T* p, T v) const {
        *p = v;
#pragma unroll
        for (int part = 0; part < MIRRORED; part++)
            if (to[part]) *reinterpret_cast<T*>(reinterpret_cast<int8*>(p) + to[part]) = v;
    }
};
#else
struct Mirrors {
    DEV Mirrors(const uint64*) {}
    template <class T>
    DEV void store(T* p, T v) const {
        *p = v;
    }
};
#endif
