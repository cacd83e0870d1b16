/* XXH3 and streaming copies for the instruction set 'base'; see hash_impl.h. */
#define KVFS_OPS_NAME kvfs_hash_ops_base
#include "hash_impl.h"
