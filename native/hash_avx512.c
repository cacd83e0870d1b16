/* XXH3 and streaming copies for the instruction set 'avx512'; see hash_impl.h. */
#define XXH_VECTOR XXH_AVX512
#define KVFS_OPS_NAME kvfs_hash_ops_avx512
#include "hash_impl.h"
