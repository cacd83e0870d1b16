/* Which instruction set the copy and hash loops use.
 *
 * Thread-safety: all functions may be called from any thread at any time. */
#ifndef KVFS_CPU_H
#define KVFS_CPU_H

#include <stddef.h>

enum kvfs_isa {
    KVFS_ISA_BASE = 0, /* what every CPU of the architecture has (x86-64: SSE2) */
    KVFS_ISA_AVX2 = 1,
    KVFS_ISA_AVX512 = 2,
};

enum { KVFS_CPU_FEATURES_MAX = 16 };

/* The best set that this CPU runs well. The environment variable KVFS_ISA (base, avx2, avx512)
 * lowers it; it is read once. */
enum kvfs_isa kvfs_cpu_isa(void);

/* Fill names with static strings, the chosen set first; returns how many.
 * REQUIRES: room for KVFS_CPU_FEATURES_MAX names. */
size_t kvfs_cpu_features(const char **names);

#endif
