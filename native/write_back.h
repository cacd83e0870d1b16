/* Ordinary stores that reach the persistence domain of a DAX mapping: the lines they touched are
 * written back, then fenced.
 *
 * For small things that are read again soon; large ones go past the caches (kvfs_copy_hash).
 * The fence is the storing thread's own: no other thread could order its lines.
 *
 * Thread-safety: any thread. REQUIRES: kvfs_guard_install() succeeded. */
#ifndef KVFS_WRITE_BACK_H
#define KVFS_WRITE_BACK_H

#include <stddef.h>
#include <stdint.h>

/* Ways to write a line back, the better the higher. */
enum kvfs_write_back {
    KVFS_WRITE_BACK_FENCE = 0,  /* another architecture: the fence alone */
    KVFS_WRITE_BACK_CLFLUSH,    /* evicts, one line after the other */
    KVFS_WRITE_BACK_CLFLUSHOPT, /* evicts */
    KVFS_WRITE_BACK_CLWB,       /* the line stays in the cache */
    KVFS_WRITE_BACK_COUNT,
};

/* The best way that this CPU has. */
enum kvfs_write_back kvfs_write_back_best(void);

const char *kvfs_write_back_name(enum kvfs_write_back way);

/* Store nbytes, write their lines back and fence. Returns KVFS_DONE; KVFS_FAULT if source or target
 * could not be touched: what the target then holds is undefined. REQUIRES: the CPU has the way. */
int32_t kvfs_store(void *target, const void *source, size_t nbytes, enum kvfs_write_back way);

/* Make every page of a range dirty again, without changing a byte whoever stores to it meanwhile:
 * after a failed fdatasync the kernel takes pages for written that are not. Returns KVFS_DONE, or
 * KVFS_FAULT if a page could not be touched: the others after it are left out. */
int32_t kvfs_touch(void *target, size_t nbytes);

#endif
