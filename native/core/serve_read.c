#include "serve_read.h"

#include "device.h"
#include "guard.h"
#include "read_lane.h"
#include "write_lane.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* What a READ asks of a file in segments. */
struct job {
    struct core *core;
    struct reader *reader;
    struct read_lane *lane;
    uint64_t position;
    uint64_t end;
    struct body body;
    bool must_copy; /* into the reader's buffer: too many parts, or no mapping */
};

/* The part of one block that a READ asks for. */
struct piece {
    struct block *block;
    uint64_t offset; /* in the segment */
    size_t stored;
    size_t zeroes; /* after the stored bytes */
};

static struct piece piece_at(const struct read_lane *lane, uint64_t position, uint64_t end)
{
    uint64_t index = position / lane->stride;
    uint64_t within = position % lane->stride;
    struct block *block = &lane->blocks[index];
    uint64_t nbytes = lane->stride - within;
    if (nbytes > end - position)
        nbytes = end - position;
    uint64_t stored = within < block->stored ? block->stored - within : 0;
    if (stored > nbytes)
        stored = nbytes;
    return (struct piece){
        .block = block,
        .offset = block->offset + within,
        .stored = (size_t)stored,
        .zeroes = (size_t)(nbytes - stored),
    };
}

struct hashing {
    const uint8_t *data;
    size_t nbytes;
    uint8_t digest[KVFS_DIGEST_BYTES];
};

static void run_hash(void *argument)
{
    struct hashing *hashing = argument;
    kvfs_hash_ops()->hash128(hashing->data, hashing->nbytes, hashing->digest);
}

/* Hash a block through the reader's buffer, where it is not mapped. */
static bool hash_by_reading(const struct job *job, const struct block *block,
                            uint8_t digest[KVFS_DIGEST_BYTES])
{
    struct kvfs_hash_state state;
    kvfs_hash_ops()->reset(&state);
    uint64_t done = 0;
    while (done < block->stored) {
        uint64_t left = block->stored - done;
        size_t wanted = left < job->core->payload_max ? (size_t)left : job->core->payload_max;
        ssize_t got = pread(block->segment->fd, job->reader->buffer, wanted,
                            (off_t)(block->offset + done));
        if (got <= 0)
            return false;
        kvfs_hash_ops()->update(&state, job->reader->buffer, (size_t)got);
        done += (uint64_t)got;
    }
    kvfs_hash_ops()->finish(&state, digest);
    return true;
}

/* Verify a block when it is first touched. */
static bool verify(const struct job *job, struct block *block)
{
    if (!(job->lane->flags & READ_VERIFY) || block->segment == NULL ||
        (atomic_load_explicit(&block->flags, memory_order_relaxed) & BLOCK_VERIFIED) ||
        segment_is_verified(block->segment, block->offset))
        return true;
    struct hashing hashing = {.nbytes = (size_t)block->stored};
    const uint8_t *map = segment_map(&job->core->segments, block->segment);
    bool is_hashed;
    if (map != NULL) {
        hashing.data = map + block->offset;
        is_hashed = kvfs_guard_run(run_hash, &hashing);
    } else {
        is_hashed = hash_by_reading(job, block, hashing.digest);
    }
    if (!is_hashed) {
        count(&job->core->counters.faults, 1);
        return false;
    }
    if (memcmp(hashing.digest, block->digest, sizeof hashing.digest) != 0) {
        count(&job->core->counters.verify_failures, 1);
        return false;
    }
    atomic_fetch_or(&block->flags, BLOCK_VERIFIED);
    segment_set_verified(block->segment, block->offset);
    return true;
}

static bool add_part(struct body *body, const uint8_t *data, size_t nbytes)
{
    if (nbytes == 0)
        return true;
    struct iovec *last = &body->parts[body->count];
    if (body->count > 0 && (const uint8_t *)last->iov_base + last->iov_len == data) {
        last->iov_len += nbytes;
    } else {
        if (body->count == PARTS_MAX)
            return false;
        body->parts[++body->count] = (struct iovec){(void *)data, nbytes};
    }
    body->nbytes += nbytes;
    return true;
}

/* Verify all blocks and list their bytes; false: the owner must read. */
static bool gather(struct job *job)
{
    uint64_t position = job->position;
    while (position < job->end) {
        struct piece piece = piece_at(job->lane, position, job->end);
        position += piece.stored + piece.zeroes;
        if (!verify(job, piece.block))
            return false;
        const uint8_t *map = NULL;
        if (piece.stored > 0 && !job->must_copy)
            map = segment_map(&job->core->segments, piece.block->segment);
        if (piece.stored > 0 && map == NULL)
            job->must_copy = true;
        if (!job->must_copy && (!add_part(&job->body, map + piece.offset, piece.stored) ||
                                !add_part(&job->body, job->core->zeroes, piece.zeroes)))
            job->must_copy = true;
    }
    return true;
}

/* Have the pages in memory before the kernel copies them: a fault in its copy could not be turned
 * into anything but EIO, and a stalled device would stall it past any deadline. */
static bool populate(struct job *job)
{
    for (int i = 1; i <= job->body.count && !job->must_copy; i++) {
        uintptr_t start = (uintptr_t)job->body.parts[i].iov_base;
        uintptr_t end = start + job->body.parts[i].iov_len;
        if (job->body.parts[i].iov_base == (const void *)job->core->zeroes)
            continue;
        start &= ~(uintptr_t)(PAGE - 1);
        int status;
        do
            status = madvise((void *)start, end - start, MADV_POPULATE_READ);
        while (status != 0 && (errno == EINTR || errno == EAGAIN));
        if (status != 0 && errno != EINVAL) {
            count(&job->core->counters.faults, 1);
            return false;
        }
        /* EINVAL: the kernel is older than 5.14, or the mapping is not of pages. */
        job->must_copy = status != 0;
    }
    return true;
}

static bool read_fully(int fd, uint8_t *target, size_t nbytes, uint64_t offset)
{
    while (nbytes > 0) {
        ssize_t got = pread(fd, target, nbytes, (off_t)offset);
        if (got <= 0 && !(got < 0 && errno == EINTR))
            return false;
        if (got > 0) {
            target += got;
            nbytes -= (size_t)got;
            offset += (uint64_t)got;
        }
    }
    return true;
}

/* Copy all into the reader's buffer instead. */
static bool copy(struct job *job)
{
    uint8_t *target = job->reader->buffer;
    uint64_t position = job->position;
    while (position < job->end) {
        struct piece piece = piece_at(job->lane, position, job->end);
        if (piece.stored > 0 &&
            !read_fully(piece.block->segment->fd, target, piece.stored, piece.offset)) {
            count(&job->core->counters.faults, 1);
            return false;
        }
        memset(target + piece.stored, 0, piece.zeroes);
        target += piece.stored + piece.zeroes;
        position += piece.stored + piece.zeroes;
    }
    job->body.count = 1;
    job->body.nbytes = (size_t)(job->end - job->position);
    job->body.parts[1] = (struct iovec){job->reader->buffer, job->body.nbytes};
    return true;
}

/* Bytes that must be hashed before the first answer, at most: the deadline knows of them. */
static uint64_t hashed_bytes(const struct job *job)
{
    if (!(job->lane->flags & READ_VERIFY) || job->end <= job->position)
        return 0;
    return (job->end - 1) / job->lane->stride * job->lane->stride -
           job->position / job->lane->stride * job->lane->stride + job->lane->stride;
}

static bool serve_segments(struct core *core, struct reader *reader, struct read_lane *lane,
                           const struct fuse_in_header *header,
                           const struct fuse_read_in *in)
{
    struct job job = {.core = core, .reader = reader, .lane = lane, .position = in->offset};
    uint64_t size = in->size < core->payload_max ? in->size : core->payload_max;
    uint64_t rounded = (lane->size + PAGE - 1) / PAGE * PAGE;
    if (in->offset > rounded || in->size > core->payload_max)
        return false;
    if ((lane->flags & READ_SHORT) && read_is_for_cache(in))
        return false; /* a private map of a handle past the cache: the owner decides */
    if (!(lane->flags & READ_SHORT) && in->size > rounded - in->offset)
        return false; /* the kernel believes the file to be longer: the owner decides */
    job.end = in->offset + size < lane->size ? in->offset + size : lane->size;
    if (job.position > job.end)
        job.position = job.end;
    uint32_t deadline_ms = lane->deadline_ms ? lane->deadline_ms : core->options.deadline_ms;
    reader_begin_job_within(reader, header, size + hashed_bytes(&job), deadline_ms);
    bool is_ready = gather(&job) && populate(&job) && (!job.must_copy || copy(&job));
    if (!reader_end_job(reader))
        return true;
    if (!is_ready)
        return false;
    /* Counted first: whoever waits for the bytes may look. */
    count(&core->counters.requests_native_read, 1);
    count(&core->counters.bytes_native_read, job.body.nbytes);
    if (!(lane->flags & READ_SHORT) && !(in->flags & O_DIRECT))
        page_cache_note(&core->page_cache, header->nodeid, in->offset, job.body.nbytes);
    if (device_reply_parts(reader->device, header->unique, &job.body) == -EFAULT)
        count(&core->counters.faults, 1);
    return true;
}

static bool serve_staging(struct core *core, struct reader *reader, struct write_lane *lane,
                          const struct fuse_in_header *header, const struct fuse_read_in *in)
{
    if (in->size > core->payload_max || in->offset > (uint64_t)INT64_MAX - in->size)
        return false;
    reader_begin_job(reader, header, in->size);
    ssize_t got;
    do
        got = pread(lane->fd, reader->buffer, in->size, (off_t)in->offset);
    while (got < 0 && errno == EINTR);
    if (!reader_end_job(reader))
        return true;
    if (got < 0)
        return false;
    count(&core->counters.requests_native_read, 1);
    count(&core->counters.bytes_native_read, (uint64_t)got);
    (void)device_reply(reader->device, header->unique, reader->buffer, (size_t)got);
    return true;
}

bool serve_read(struct core *core, struct reader *reader, const struct request *request)
{
    struct fuse_read_in in;
    if (!BODY_GET(request, &in))
        return false;
    struct lane *lane = files_acquire(&core->files, in.fh);
    if (lane == NULL)
        return false;
    const struct fuse_in_header *header = &request->header;
    bool is_answered;
    if (atomic_load(&lane->is_broken)) {
        (void)device_reply_error(reader->device, header->unique, EIO);
        is_answered = true;
    } else if (lane->kind == LANE_READ) {
        is_answered = serve_segments(core, reader, (struct read_lane *)lane, header, &in);
    } else {
        is_answered = serve_staging(core, reader, write_lane_of(lane), header, &in);
    }
    files_leave(&core->files, in.fh, lane);
    return is_answered;
}
