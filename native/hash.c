#include "hash.h"

#include "cpu.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#include <stdatomic.h>

extern const struct kvfs_hash_ops kvfs_hash_ops_base;
#if defined(__x86_64__)
extern const struct kvfs_hash_ops kvfs_hash_ops_avx2;
extern const struct kvfs_hash_ops kvfs_hash_ops_avx512;
#endif

const struct kvfs_hash_ops *kvfs_hash_ops(void)
{
#if defined(__x86_64__)
    switch (kvfs_cpu_isa()) {
    case KVFS_ISA_AVX512:
        return &kvfs_hash_ops_avx512;
    case KVFS_ISA_AVX2:
        return &kvfs_hash_ops_avx2;
    default:
        break;
    }
#endif
    return &kvfs_hash_ops_base;
}

void kvfs_store_fence(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#else
    atomic_thread_fence(memory_order_seq_cst);
#endif
}
