// What bounds the CPU's products of many tokens: bits first, then the kernels whole and with parts left
// out, of Q4_K and Q6_K, in one thread and in all; a table of nanoseconds a thread for 16 rows x 32
// tokens x 256 values, 131,072 products of a weight and an activation in two planes.
// Compiled and run by cpu_products.sh; half a minute with 16 threads. Without a matrix unit its
// instructions are emulated for the bits, and what needs it is not timed.
#include "level.h"

#include "formats.h"
#include "few_bits_iq.h"
#include "few_bits_ternary.h"
#include "floats.h"
#include "tile.h"
#include "matmul.h"
#include "matmul_amx.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <functional>
#include <fstream>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace isobit::portable {
extern const Kernels kernels;
}

namespace isobit::avx512vnni {

struct NoUnit {
    struct Use {
        explicit Use(int) {}
        ~Use() {}
    };
    template <int t>
    FN void clear() {}
    template <int t>
    FN void load(const void*, size_t) {}
    template <int t>
    FN void store(void*, size_t) {}
    template <int sums, int tokens, int weights, bool s>
    FN void dot() {}
};

// Loads and stores of tiles without products.
struct LoadsAlone : Amx {
    template <int sums, int tokens, int weights, bool s>
    FN void dot() {}
};

const Quantised q4 = quantised<Q4_K>("Q4_K"), q6 = quantised<Q6_K>("Q6_K");

constexpr int COLUMNS = 2048, BLOCKS = COLUMNS / 256, ROWS = 384;
constexpr int UNPACK = 1, FINISH = 2, PIPELINE = 4, FETCH = 8, ALL = UNPACK | FINISH | PIPELINE;

// several_by_unit() with parts left out; x: of a superblock `step` blocks behind the one before.
template <class Format, class Unit, int parts>
APART void some_by_unit(const Product& m, int row, int end, int n, const Activations* x, int stride, int step) {
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    F y[TOKEN_BLOCK] = {};
    static thread_local Digits both[2];
    Summed<2> summed[2];
    const Summed<2> nothing = {};
    const typename Unit::Use use(tokens_at_once(n));
    int now = 0;
    const int tokens = tokens_at_once(n);
    for (int s = 0; s < BLOCKS; ++s, x += step) {
        Digits& w = both[s & 1];
        if (parts & UNPACK) unpack_digits<Format>(rows, ahead_of(m, row, end, s, LANES * Format::bytes), w);
        for (int r = 0; r < LANES; ++r) rows[r] += Format::bytes;
        for (int done = 0; done < n; done += tokens, now ^= 1) {
            const int first = done < n - tokens ? done : n - tokens;
            Summed<2>& next = summed[now];
            next.w = &w, next.x = x + (size_t)first * stride, next.stride = stride, next.y = y + first;
            if (parts & FETCH) {
                const Activations* then = first + tokens < n ? next.x + (size_t)tokens * stride : x + step;
                for (int t = 0; t < tokens; ++t)
                    for (int i = 0; i < 512; i += 64) __builtin_prefetch((const char*)(then + (size_t)t * stride) + i);
            }
            constexpr bool pipeline = parts & PIPELINE && parts & FINISH;
            add_tokens_by_unit<Format, Unit>(pipeline ? summed[now ^ 1] : nothing, next);
            next.from = done - first, next.to = tokens;
            if (!(parts & PIPELINE) && parts & FINISH)
                for (int t = next.from; t < next.to; ++t) finish<Format>(next, t);
        }
    }
    if (parts & FINISH && parts & PIPELINE)
        for (int t = summed[now ^ 1].from; t < summed[now ^ 1].to; ++t) finish<Format>(summed[now ^ 1], t);
    for (int i = 0; i < n; ++i) store_tile(m, row, end, i, y[i]);
}

template <class Format>
APART void unpack_alone(const Product& m, int row, int end) {
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    static thread_local Digits both[2];
    for (int s = 0; s < BLOCKS; ++s) {
        unpack_digits<Format>(rows, ahead_of(m, row, end, s, LANES * Format::bytes), both[s & 1]);
        for (int r = 0; r < LANES; ++r) rows[r] += Format::bytes;
    }
}

}  // namespace isobit::avx512vnni

using namespace isobit;
using namespace isobit::avx512vnni;
using Clock = std::chrono::steady_clock;

static bool has_unit() {
    std::ifstream in("/proc/cpuinfo");
    std::string all((std::istreambuf_iterator<char>(in)), {});
    return all.find("amx_int8") != all.npos && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

// Of those from first to last the ones this process may use, and from now on no others.
static std::vector<int> cpus(int first, int last) {
    cpu_set_t set, chosen;
    sched_getaffinity(0, sizeof set, &set);
    CPU_ZERO(&chosen);
    std::vector<int> all;
    for (int i = first; i <= last; ++i)
        if (CPU_ISSET(i, &set)) all.push_back(i), CPU_SET(i, &chosen);
    if (all.empty()) {
        printf("expected processors from %d to %d, found none of them that this process may use\n", first, last);
        exit(1);
    }
    sched_setaffinity(0, sizeof chosen, &chosen);
    return all;
}

// Nanoseconds of a call of f(thread, i), i counting the calls: the mean of threads, the median of three.
static double timed(const std::vector<int>& on, const std::function<void(int, int)>& f, int ms = 25) {
    std::vector<double> found;
    for (int round = 0; round < 3; ++round) {
        std::barrier start((long)on.size());
        std::vector<double> ns(on.size());
        std::vector<std::thread> team;
        for (size_t t = 0; t < on.size(); ++t)
            team.emplace_back([&, t] {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(on[t], &set);
                sched_setaffinity(0, sizeof set, &set);
                f((int)t, 0);
                start.arrive_and_wait();
                const auto begin = Clock::now();
                auto end = begin;
                int i = 1;
                for (; end - begin < std::chrono::milliseconds(ms); end = Clock::now()) f((int)t, i++);
                ns[t] = std::chrono::duration<double, std::nano>(end - begin).count() / (i - 1);
            });
        for (std::thread& t : team) t.join();
        double sum = 0;
        for (double v : ns) sum += v;
        found.push_back(sum / on.size());
    }
    std::sort(found.begin(), found.end());
    return found[1];
}

struct Inputs {
    std::vector<Activations> rows;  // [token][block]
    std::vector<Activations> by_block;  // [block][token]
    std::vector<int32_t> order;

    Inputs(int tokens, unsigned seed) : rows((size_t)tokens * BLOCKS), by_block(rows.size()) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        std::vector<float> x(COLUMNS);
        for (int t = 0; t < tokens; ++t) {
            for (float& v : x) v = normal(random);
            avx512vnni::quantise(x.data(), COLUMNS, 2, rows.data() + (size_t)t * BLOCKS, nullptr);
            for (int s = 0; s < BLOCKS; ++s) by_block[(size_t)s * tokens + t] = rows[(size_t)t * BLOCKS + s];
            order.push_back(t);
        }
        std::shuffle(order.begin(), order.end(), random);
    }
};

template <class Format>
static void fill(uint8_t* w, size_t blocks, unsigned seed) {
    std::mt19937 random(seed);
    for (size_t b = 0; b < blocks; ++b, w += Format::bytes) {
        for (int i = 0; i < Format::bytes; ++i) w[i] = (uint8_t)random();
        const uint16_t d = 0x1c00 | (random() & 0x3ff), dmin = 0x1c00 | (random() & 0x3ff);
        if (Format::mins)
            memcpy(w, &d, 2), memcpy(w + 2, &dmin, 2);
        else
            memcpy(w + Format::bytes - 2, &d, 2);
    }
}

static Product product(const uint8_t* w, int bytes, const Inputs& x, int tokens, bool gather, float* y) {
    Product p = {w, (size_t)BLOCKS * bytes, COLUMNS, x.rows.data(), nullptr, nullptr, nullptr, y, ROWS, tokens};
    if (gather) p.x_rows = x.order.data(), p.y_rows = x.order.data();
    return p;
}

template <class Format, class Unit>
static void check(const Quantised& f, const uint8_t* w) {
    int compared = 0;
    for (int tokens : {1, 4, 5, 8, 16, 17, 33, 64, 70}) {
        const Inputs x(tokens, 7);
        for (bool gather : {false, true}) {
            std::vector<float> y[3];
            for (auto& v : y) v.assign((size_t)tokens * ROWS, -1);
            const int end = ROWS - 5;
            portable::kernels.matmul(Format::id, 2)(product(w, Format::bytes, x, tokens, gather, y[0].data()), 0, end);
            Matmul{matmul_quantised<2, false>, &f}(product(w, Format::bytes, x, tokens, gather, y[1].data()), 0, end);
            Matmul{matmul_by_unit<Format, Unit, 2>, &f}(product(w, Format::bytes, x, tokens, gather, y[2].data()), 0, end);
            for (int i : {1, 2})
                if (memcmp(y[0].data(), y[i].data(), y[0].size() * 4)) {
                    printf("%s, %d tokens: %s differ from the portable level\n", f.info.name, tokens,
                           i == 1 ? "vectors" : "the unit's products");
                    exit(1);
                }
            compared += 2 * tokens * end;
        }
    }
    printf("%s: %d values equal to the portable level's\n", f.info.name, compared);
}

struct Table {
    std::vector<std::pair<std::string, std::vector<int>>> columns;
    std::vector<std::string> rows;

    void add(const std::string& name, double units, const std::function<void(int, int)>& f) {
        printf("%-58s", name.c_str());
        for (auto& [label, on] : columns) printf(" %9.0f", timed(on, f) / units);
        printf("\n");
        fflush(stdout);
    }
};

alignas(64) static char l1[8192];

template <class Unit>
static void hardware(Table& table, bool unit) {
    table.add("dependent additions: ps each (clock)", 1e-3 * 1e5, [](int, int) {
        __m512i a = {};
        for (int i = 0; i < 10000; ++i) {
#pragma GCC unroll 10
            for (int j = 0; j < 10; ++j) asm volatile("vpaddd %0, %0, %0" : "+v"(a));
        }
    });
    table.add("4,096 dpbusd in registers", 25, [](int, int) {
        __m512i s[12] = {}, x = _mm512_set1_epi8(3);
        for (int i = 0; i < 25 * 4096 / 12; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < 12; ++j) asm volatile("vpdpbusd %1, %1, %0" : "+v"(s[j]) : "v"(x));
        }
    });
    table.add("as many with a broadcast from L1 each", 25, [](int, int) {
        __m512i s[12] = {}, x = _mm512_set1_epi8(3);
        for (int i = 0; i < 25 * 4096 / 12; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < 12; ++j)
                asm volatile("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(s[j]) : "m"(*(const int*)(l1 + 64 * j)), "v"(x));
        }
    });
    if (!unit) return;
    table.add("32 products of tiles", 100, [](int, int) {
        const typename Unit::Use use(16);
        for (int i = 0; i < 100 * 8; ++i) {
            Unit::template dot<0, 4, 6, false>(), Unit::template dot<1, 4, 7, false>();
            Unit::template dot<2, 5, 6, false>(), Unit::template dot<3, 5, 7, false>();
        }
    });
    table.add("with 32 loads from L1", 100, [](int, int) {
        const typename Unit::Use use(16);
        for (int i = 0; i < 100 * 8; ++i) {
            Unit::template load<4>(l1, 64), Unit::template load<6>(l1 + 1024, 64);
            Unit::template dot<0, 4, 6, false>();
            Unit::template load<7>(l1 + 2048, 64);
            Unit::template dot<1, 4, 7, false>();
            Unit::template load<5>(l1 + 3072, 64);
            Unit::template dot<2, 5, 6, false>(), Unit::template dot<3, 5, 7, false>();
        }
    });
    table.add("32 loads from L1 alone", 100, [](int, int) {
        const typename Unit::Use use(16);
        for (int i = 0; i < 100 * 8; ++i) {
            Unit::template load<4>(l1, 64), Unit::template load<6>(l1 + 1024, 64);
            Unit::template load<7>(l1 + 2048, 64), Unit::template load<5>(l1 + 3072, 64);
        }
    });
    table.add("8 stores of tiles to L1", 100, [](int t, int) {
        static char to[64][8192] __attribute__((aligned(64)));
        const typename Unit::Use use(16);
        for (int i = 0; i < 100 * 2; ++i) {
            Unit::template store<0>(to[t], 64), Unit::template store<1>(to[t] + 1024, 64);
            Unit::template store<2>(to[t] + 2048, 64), Unit::template store<3>(to[t] + 3072, 64);
        }
    });
    table.add("registers of tiles asked for and given back", 100, [](int, int) {
        for (int i = 0; i < 100; ++i) const typename Unit::Use use(16);
    });
}

int main(int, char** argv) {
    const std::vector<int> all = cpus(atoi(argv[1]), atoi(argv[2]));
    const bool unit = has_unit();
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.find("Store_Bypass") != line.npos) std::cout << line << "\n";
    std::ifstream quota("/sys/fs/cgroup/cpu.max"), huge("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string q, h;
    std::getline(quota, q), std::getline(huge, h);
    printf("cpu.max: %s; large pages: %s; %zu processors from %d on; compiled by %s\n", q.c_str(), h.c_str(),
           all.size(), all[0], __VERSION__);

    const size_t tile4 = (size_t)ROWS * BLOCKS * Q4_K::bytes, tile6 = (size_t)ROWS * BLOCKS * Q6_K::bytes;
    std::vector<uint8_t> w4(tile4 + 64), w6(tile6 + 64);
    fill<Q4_K>(w4.data(), (size_t)ROWS * BLOCKS, 1), fill<Q6_K>(w6.data(), (size_t)ROWS * BLOCKS, 2);
    if (unit)
        check<Q4_K, Amx>(q4, w4.data()), check<Q6_K, Amx>(q6, w6.data());
    else
        check<Q4_K, EmulatedAmx>(q4, w4.data()), check<Q6_K, EmulatedAmx>(q6, w6.data());

    Table table;
    table.columns.push_back({"1 thread", {all[0]}});
    if (all.size() > 2) table.columns.push_back({"all", all});
    printf("%-58s", "ns a thread for 16 rows x 32 tokens x 256 values");
    for (auto& [label, on] : table.columns) printf(" %9s", label.c_str());
    printf("\n");
    hardware<Amx>(table, unit);

    // Memory: each thread a stretch of its own; weights, activations and results of its own.
    const int threads = (int)all.size();
    const size_t copies = std::max<size_t>(2, (size_t)(1536u << 20) / tile4 / threads) * threads;
    const size_t bytes = copies * tile4;
    uint8_t* far = (uint8_t*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(far, bytes, MADV_HUGEPAGE);
    {
        std::vector<std::thread> team;
        for (int t = 0; t < threads; ++t)
            team.emplace_back([&, t] {
                for (size_t c = t * copies / threads; c < (t + 1) * copies / threads; ++c)
                    memcpy(far + c * tile4, w4.data(), tile4);
            });
        for (auto& t : team) t.join();
    }
    auto far_of = [&](int t, int i) { return far + ((size_t)t * (copies / threads) + (size_t)i % (copies / threads)) * tile4; };
    std::vector<Inputs> inputs;
    std::vector<std::vector<uint8_t>> near4(threads, w4), near6(threads, w6);
    std::vector<std::vector<float>> y(threads, std::vector<float>(64 * ROWS));
    for (int t = 0; t < threads; ++t) inputs.emplace_back(64, t);
    auto sweep = [&](const uint8_t* p, size_t n) {
        __m512i sum = {};
        for (size_t i = 0; i < n; i += 256) {
#pragma GCC unroll 4
            for (int j = 0; j < 256; j += 64) sum = _mm512_xor_si512(sum, _mm512_loadu_si512(p + i + j));
        }
        asm volatile("" : : "v"(sum));
    };
    table.add("20 KB of plain reads: L2 (400 KB)", 20, [&](int t, int) { sweep(near4[t].data(), 20 * 20480); });
    table.add("L3 (6 MB)", 300, [&](int t, int) { sweep(far_of(t, 0), 300 * 20480); });
    table.add("memory", (double)tile4 / 20480, [&](int t, int i) { sweep(far_of(t, i), tile4); });

    const double tiles = ROWS / 16 * BLOCKS;
    auto whole = [&](const char* name, const Quantised& f, auto multiply, auto weights, int tokens, bool gather) {
        table.add(name, tiles * tokens / 32, [&, multiply, weights, tokens, gather](int t, int i) {
            Matmul{multiply, &f}(product(weights(t, i), f.info.bytes, inputs[t], tokens, gather, y[t].data()), 0, ROWS);
        });
    };
    auto n4 = [&](int t, int) { return (const uint8_t*)near4[t].data(); };
    auto n6 = [&](int t, int) { return (const uint8_t*)near6[t].data(); };
    auto f4 = [&](int t, int i) { return (const uint8_t*)far_of(t, i); };
    printf("Q4_K, 32 gathered tokens of 2,048, 384 rows\n");
    whole("vectors, weights in L2", q4, matmul_quantised<2, false>, n4, 32, true);
    whole("vectors, from memory", q4, matmul_quantised<2, false>, f4, 32, true);
    auto parts = [&](const char* name, auto f, auto weights, bool by_block) {
        table.add(name, tiles, [&, f, weights, by_block](int t, int i) {
            const Product m = product(weights(t, i), Q4_K::bytes, inputs[t], 32, false, y[t].data());
            for (int row = 0; row < ROWS; row += LANES)
                if (by_block)
                    f(m, row, ROWS, 32, inputs[t].by_block.data(), 1, 64);
                else
                    f(m, row, ROWS, 32, m.q, BLOCKS, 1);
        });
    };
    table.add("unpacking alone, weights in L2", tiles, [&](int t, int) {
        const Product m = product(near4[t].data(), Q4_K::bytes, inputs[t], 32, false, y[t].data());
        for (int row = 0; row < ROWS; row += LANES) unpack_alone<Q4_K>(m, row, ROWS);
    });
    parts("no tiles, L2", some_by_unit<Q4_K, NoUnit, ALL>, n4, false);
    parts("no tiles, no unpacking, L2", some_by_unit<Q4_K, NoUnit, ALL - UNPACK>, n4, false);
    if (unit) {
        whole("unit, weights in L2", q4, matmul_by_unit<Q4_K, Amx, 2>, n4, 32, true);
        whole("unit, from memory", q4, matmul_by_unit<Q4_K, Amx, 2>, f4, 32, true);
        parts("unit, not gathered, L2", some_by_unit<Q4_K, Amx, ALL>, n4, false);
        parts("… tokens of a superblock side by side, L2", some_by_unit<Q4_K, Amx, ALL>, n4, true);
        parts("… and activations prefetched, L2", some_by_unit<Q4_K, Amx, ALL | FETCH>, n4, true);
        parts("activations prefetched, L2", some_by_unit<Q4_K, Amx, ALL | FETCH>, n4, false);
        parts("finished at once, L2", some_by_unit<Q4_K, Amx, UNPACK | FINISH>, n4, false);
        parts("not finished, L2", some_by_unit<Q4_K, Amx, UNPACK>, n4, false);
        parts("not unpacked, L2", some_by_unit<Q4_K, Amx, ALL - UNPACK>, n4, false);
        parts("tiles alone, L2", some_by_unit<Q4_K, Amx, 0>, n4, false);
        parts("tiles alone side by side, L2", some_by_unit<Q4_K, Amx, 0>, n4, true);
        parts("tiles' loads and stores alone, L2", some_by_unit<Q4_K, LoadsAlone, 0>, n4, false);
        whole("unit, 8 tokens, from memory", q4, matmul_by_unit<Q4_K, Amx, 2>, f4, 8, true);
        whole("unit, 16 tokens, from memory", q4, matmul_by_unit<Q4_K, Amx, 2>, f4, 16, true);
        whole("unit, 64 tokens, from memory", q4, matmul_by_unit<Q4_K, Amx, 2>, f4, 64, true);
    }
    whole("vectors, 8 tokens, from memory", q4, matmul_quantised<2, false>, f4, 8, true);
    printf("Q6_K, 32 gathered tokens\n");
    whole("vectors, weights in L2", q6, matmul_quantised<2, false>, n6, 32, true);
    if (unit) whole("unit, weights in L2", q6, matmul_by_unit<Q6_K, Amx, 2>, n6, 32, true);

    printf("Q4_K, 512 tokens that all threads share (2.6 MB), weights in L2, by rows and tokens at a time\n");
    const Inputs shared(512, 9);
    std::vector<std::vector<float>> out(threads, std::vector<float>(512 * ROWS));
    for (auto [rows, tokens] : {std::pair{16, 512}, {64, 512}, {160, 64}, {384, 64}}) {
        for (int way = 0; way < (unit ? 2 : 1); ++way) {
            const std::string name = std::string(way ? "unit, " : "vectors, ") + std::to_string(rows) + " x " + std::to_string(tokens);
            table.add(name, rows / 16 * BLOCKS * tokens / 32.0, [&, rows = rows, tokens = tokens](int t, int i) {
                Product m = product(near4[t].data(), Q4_K::bytes, shared, tokens, false, out[t].data());
                const int first = tokens == 64 ? i % 8 * 64 : 0;
                m.q += (size_t)first * BLOCKS, m.y += (size_t)first * ROWS;
                Matmul{way ? matmul_by_unit<Q4_K, Amx, 2> : matmul_quantised<2, false>, &q4}(m, 0, rows);
            });
        }
    }
}
