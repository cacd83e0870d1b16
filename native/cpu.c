#include "cpu.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const char *const isa_names[] = {"base", "avx2", "avx512"};

static enum kvfs_isa detect(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* VBMI2 came with Ice Lake and Zen 4: older AVX-512 CPUs lower their clock for wide
     * multiplies, so AVX2 is the better choice there. CLWB is there on all that pass. */
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi2"))
        return KVFS_ISA_AVX512;
    if (__builtin_cpu_supports("avx2"))
        return KVFS_ISA_AVX2;
#endif
    return KVFS_ISA_BASE;
}

static enum kvfs_isa choose(void)
{
    enum kvfs_isa isa = detect();
    const char *wanted = getenv("KVFS_ISA");
    if (wanted == NULL)
        return isa;
    for (int i = 0; i < (int)isa; i++)
        if (strcmp(wanted, isa_names[i]) == 0)
            return (enum kvfs_isa)i;
    return isa;
}

enum kvfs_isa kvfs_cpu_isa(void)
{
    /* Zero means not chosen yet; racing threads choose the same. */
    static atomic_int chosen;
    int value = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (value == 0) {
        value = (int)choose() + 1;
        atomic_store_explicit(&chosen, value, memory_order_relaxed);
    }
    return (enum kvfs_isa)(value - 1);
}

size_t kvfs_cpu_features(const char **names)
{
    size_t count = 0;
    names[count++] = isa_names[kvfs_cpu_isa()];
#if defined(__x86_64__)
    __builtin_cpu_init();
#define ADD(name) \
    if (__builtin_cpu_supports(name)) \
        names[count++] = "cpu:" name
    ADD("sse2");
    ADD("sse4.2");
    ADD("avx");
    ADD("avx2");
    ADD("avx512f");
    ADD("avx512bw");
    ADD("avx512vl");
    ADD("avx512vbmi2");
#undef ADD
#endif
    return count;
}
