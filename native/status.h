/* The result of one item of a batch (int32): 0, one of these, or -errno. */
#ifndef KVFS_STATUS_H
#define KVFS_STATUS_H

enum {
    KVFS_DONE = 0,
    KVFS_MISMATCH = 1,   /* the checksum differs */
    KVFS_SHORT_READ = 2, /* end of file */
    KVFS_FAULT = 3,      /* SIGBUS or poison while reading or writing memory */
};

#endif
