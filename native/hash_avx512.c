/* XXH3 and streaming copies for the instruction set 'avx512'; see hash_impl.h. */
/* Software prefetch costs this variant a fifth: 20 GB/s against 25 without (Zen 4, one core, 1 MiB
 * items from memory); the others gain from it. */
#define XXH_NO_PREFETCH
#define XXH_VECTOR XXH_AVX512
#define KVFS_OPS_NAME kvfs_hash_ops_avx512
#include "hash_impl.h"
