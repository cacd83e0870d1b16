/* What the core needs of the kernel's FUSE protocol beyond the installed <linux/fuse.h>, which may
 * be older than passthrough (7.40). Offsets are those of every kernel since. */
#ifndef CORE_PROTOCOL_H
#define CORE_PROTOCOL_H

#include <linux/fuse.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Bits of flags2, the upper half of the INIT flags. */
enum { INIT2_PASSTHROUGH = 1u << 5 };
enum { OPEN_PASSTHROUGH = 1u << 7 };
/* max_stack_depth follows flags2; backing_id takes the place of the padding of fuse_open_out. */
enum {
    INIT_STACK_DEPTH_OFFSET = offsetof(struct fuse_init_out, flags2) + 4,
    OPEN_BACKING_OFFSET = offsetof(struct fuse_open_out, open_flags) + 4,
};

struct backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define BACKING_OPEN _IOW(FUSE_DEV_IOC_MAGIC, 1, struct backing_map)
#define BACKING_CLOSE _IOW(FUSE_DEV_IOC_MAGIC, 2, uint32_t)
#ifndef FUSE_DEV_IOC_MAGIC
#define FUSE_DEV_IOC_MAGIC 229
#endif

/* Requests of the core's own. The kernel counts up from 2 and marks with bits 0 and 63. */
#define UNIQUE_OWN (UINT64_C(1) << 62)
#define UNIQUE_INTERRUPT UINT64_C(1)

/* In the offset of a READ that goes to the owner: the kernel wants it for its page cache. It names
 * whom it reads for otherwise; the owner's library passes neither on. */
#define READ_FOR_CACHE (UINT64_C(1) << 62)

static inline bool read_is_for_cache(const struct fuse_read_in *read)
{
    return !(read->read_flags & FUSE_READ_LOCKOWNER);
}

enum {
    IN_HEADER = sizeof(struct fuse_in_header),
    OUT_HEADER = sizeof(struct fuse_out_header),
    WRITE_HEADER = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in),
    PAGE = 4096,
};

/* A request as the kernel sent it. */
struct request {
    struct fuse_in_header header;
    const uint8_t *bytes; /* whole, header included */
    size_t nbytes;
    const uint8_t *body;
    size_t body_bytes;
};

/* Copy a struct from the start of a body; returns 0 if the body is too short. */
static inline int body_get(const struct request *request, void *target, size_t nbytes)
{
    if (request->body_bytes < nbytes)
        return 0;
    memcpy(target, request->body, nbytes);
    return 1;
}

#define BODY_GET(request, target) body_get((request), (target), sizeof *(target))

static inline uint32_t load32(const uint8_t *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline uint64_t load64(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static inline void store32(uint8_t *bytes, uint32_t value)
{
    memcpy(bytes, &value, sizeof value);
}

static inline void store64(uint8_t *bytes, uint64_t value)
{
    memcpy(bytes, &value, sizeof value);
}

#endif
