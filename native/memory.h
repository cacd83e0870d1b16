/* Descriptors of memory, and poison for tests. Errors are -errno. Thread-safety: any thread. */
#ifndef KVFS_MEMORY_H
#define KVFS_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Make a close-on-exec memfd of nbytes; returns the descriptor or -errno.
 * is_final adds the seals of kvfs_memfd_seal(fd, false). */
int kvfs_memfd(const char *name, uint64_t nbytes, bool is_final);

/* Fix the size for ever, and the set of seals. is_read_only also refuses writing and new writable
 * mappings; existing ones stay. */
int kvfs_memfd_seal(int fd, bool is_read_only);

/* Make pages raise SIGBUS by UFFDIO_POISON. -EOPNOTSUPP if the kernel cannot.
 * REQUIRES: address and nbytes are multiples of 4096; a mapping of anonymous memory or a memfd.
 * Private content of the pages is lost. */
int kvfs_poison(uintptr_t address, uint64_t nbytes);

/* Say of n mapped ranges of memory files which are wholly in memory: 0 in statuses (int32), 1 if
 * not, -errno where nothing is mapped. What is not there is a hole, or swapped out; to look for it
 * allocates nothing, as a read would. Arrays of u64. Returns how many are not 0. */
size_t kvfs_absent(const void *addresses, const void *lengths, size_t count, void *statuses);

#endif
