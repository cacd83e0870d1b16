/* One transfer between a file and memory, as the ways of doing it take it (uring.h, io_threads.h).
 */
#ifndef KVFS_IO_OP_H
#define KVFS_IO_OP_H

#include <stdbool.h>
#include <stdint.h>

struct kvfs_io_op {
    uint64_t offset;
    uint8_t *data;
    uint32_t nbytes;
    int fd;
    int flags; /* RWF_* of preadv2 */
    bool is_write;
    bool is_fixed; /* data lies in the registered buffer */
};

#endif
