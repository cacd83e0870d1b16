/* The table of file handles: what the kernel has open, and the lane of each.
 *
 * Thread-safety: any thread; lanes are begun, served and closed by the control thread, and dropped
 * by the reader that sees the RELEASE. One rwlock, held for book-keeping only. */
#ifndef CORE_FILES_H
#define CORE_FILES_H

#include "backings.h"
#include "lane.h"

#include <pthread.h>
#include <stddef.h>

enum { FILE_BUCKETS = 8192, FILES_MAX = 1 << 20 };

struct file {
    struct file *next;
    uint64_t fh;
    uint64_t nodeid;
    uint32_t open_flags;
    uint32_t open_count; /* how often the kernel has it open */
    bool is_directory;
    struct lane *lane;
    struct backing *backing;
    bool is_left; /* released while its lane was in use: whoever leaves it last drops it */
};

struct files {
    pthread_rwlock_t lock;
    struct file *buckets[FILE_BUCKETS];
    unsigned count;
    atomic_uint generation; /* counts owners */
    atomic_uint left_count; /* files that are left */
    struct backings *backings;
};

struct handle {
    uint64_t fh;
    uint64_t nodeid;
    uint32_t open_flags;
    uint32_t lane;
};

int files_create(struct files *files, struct backings *backings);
void files_destroy(struct files *files);

/* Install a lane, not served yet. -EEXIST if the handle has one. */
int files_begin(struct files *files, uint64_t fh, struct lane *lane);

/* The lane that is being installed, or NULL. Only the control thread may use it. */
struct lane *files_building(struct files *files, uint64_t fh);

/* From now on files_acquire finds it. */
void files_serve(struct files *files, uint64_t fh);

/* Count the caller as a user of the handle's lane, or NULL: give it back by files_leave. */
struct lane *files_acquire(struct files *files, uint64_t fh);

/* Stop using it. The kernel may have released the handle meanwhile: it hears of an answer before
 * the reader that gave it is done. Then the last user does what files_released could not. */
void files_leave(struct files *files, uint64_t fh, struct lane *lane);

/* Close the lane of a handle and wait for its users. 0 with *lane (NULL: it had none), to be
 * destroyed by the caller, or -EBUSY: try again. Gives the backing back. */
int files_close(struct files *files, uint64_t fh, int64_t wait_ms, struct lane **lane);

/* Note the backing of a handle. */
int files_set_backing(struct files *files, uint64_t fh, uint64_t nodeid, struct backing *backing);

/* The backing id of a handle, or 0. */
uint32_t files_backing_id(struct files *files, uint64_t fh);

/* The kernel has a handle open. */
void files_opened(struct files *files, const struct handle *handle, bool is_directory);

/* Whether a handle has a lane that only reads. */
bool files_only_reads(struct files *files, uint64_t fh);

/* Whether the kernel has a file of this inode open. */
bool files_is_open(struct files *files, uint64_t nodeid);

/* It has it no more: gives the backing back and drops a lane for reading, or a dead owner's. */
void files_released(struct files *files, uint64_t fh);

/* The owner died: its writers are broken, and what it installed for no open handle is dropped. */
void files_next_owner(struct files *files);

/* Call for every write lane of an inode. The lock is held: do not block. */
void files_for_writers(struct files *files, uint64_t nodeid,
                       void (*function)(struct lane *lane, uint64_t argument), uint64_t argument);

/* The open files (no directories), ordered by number, from index `first` on; returns how many, at
 * most `room`, or -ENOMEM. */
int64_t files_handles(struct files *files, uint64_t first, struct handle *handles, size_t room);

unsigned files_open_count(struct files *files);

#endif
