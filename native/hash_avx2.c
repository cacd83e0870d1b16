/* XXH3 and streaming copies for the instruction set 'avx2'; see hash_impl.h. */
#define XXH_VECTOR XXH_AVX2
#define KVFS_OPS_NAME kvfs_hash_ops_avx2
#include "hash_impl.h"
