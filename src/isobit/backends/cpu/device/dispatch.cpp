// Which SIMD levels this build has and this machine can run, best first.

#include <string.h>

#include "../kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__) && defined(__aarch64__)
#include <sys/sysctl.h>
#endif

namespace isobit {

#if defined(__x86_64__)
namespace avx512vnni { extern const Kernels kernels, streaming, amx, emulated_amx; }
namespace avx2 { extern const Kernels kernels, streaming; }
#elif defined(__aarch64__)
namespace neon { extern const Kernels kernels; }
namespace neon_i8mm { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }

namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*usable)();
};

#if defined(__x86_64__)
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

// Whether the processor has a matrix unit, and whether the system lets this process use its registers:
// it must allow them, once and for all threads.
enum class Unit { none, refused, usable };
Unit unit() {
#if defined(__linux__)
    static const Unit found = [] {
        constexpr unsigned tile = 1 << 24, int8 = 1 << 25;
        constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a, b, c, d;
        if (!has_avx512vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tile && d & int8))
            return Unit::none;
        return syscall(SYS_arch_prctl, request, tile_data) == 0 ? Unit::usable : Unit::refused;
    }();
    return found;
#else
    return Unit::none;
#endif
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }

// Whether weights are best fetched as data that is used once. Zen 5 then keeps them out of the third
// level; Zen 4 can have too few such lines under way.
bool streams() {
    static const bool zen5 = [] {
        unsigned a, b, c, d;
        if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
        return (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;
    }();
    return zen5;
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_dot_products() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() { return has_dot_products() && getauxval(AT_HWCAP2) & HWCAP2_I8MM; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_dot_products() { return true; }  // every 64-bit Apple machine
bool has_i8mm() {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
}
#elif defined(__aarch64__)
bool has_dot_products() { return false; }
bool has_i8mm() { return false; }
#endif

const Candidate candidates[] = {
#if defined(__x86_64__)
    {&avx512vnni::amx, [] { return unit() == Unit::usable; }},
    {&avx512vnni::streaming, [] { return has_avx512vnni() && streams(); }},
    {&avx512vnni::kernels, [] { return has_avx512vnni() && !streams(); }},
    {&avx2::streaming, [] { return has_avx2() && streams(); }},
    {&avx2::kernels, [] { return has_avx2() && !streams(); }},
#elif defined(__aarch64__)
    {&neon_i8mm::kernels, has_i8mm},
    {&neon::kernels, has_dot_products},
#endif
    {&portable::kernels, [] { return true; }},
};

}  // namespace

const Kernels* usable_kernels(int i) {
    for (const Candidate& c : candidates)
        if (c.usable() && i-- == 0) return c.kernels;
    return nullptr;
}

bool refused_unit() {
#if defined(__x86_64__)
    return unit() == Unit::refused;
#else
    return false;
#endif
}

const Kernels* find_kernels(const char* name) {
    const Kernels* k;
    for (int i = 0; (k = usable_kernels(i)); ++i)
        if (!name || strcmp(name, k->name) == 0) return k;
#if defined(__x86_64__)
    k = &avx512vnni::emulated_amx;  // for tests
    if (has_avx512vnni() && strcmp(name, k->name) == 0) return k;
#endif
    return nullptr;
}

}  // namespace isobit
