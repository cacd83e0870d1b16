#include "serve_write.h"

#include "device.h"
#include "write_lane.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

/* Write within the credit. Returns whether the request is answered. */
static bool write_staging(struct core *core, struct reader *reader, struct write_lane *lane,
                          const struct fuse_in_header *header, const struct fuse_write_in *in,
                          const uint8_t *data)
{
    reader_begin_job(reader, header, in->size);
    ssize_t written;
    do
        written = pwrite(lane->fd, data, in->size, (off_t)in->offset);
    while (written < 0 && errno == EINTR);
    if (!reader_end_job(reader)) {
        write_lane_break_hash(lane); /* the writer was told that it failed */
        return true;
    }
    /* In any case: what the owner will write instead follows, too. */
    write_lane_note(lane, in->offset, data, in->size);
    if (written != (ssize_t)in->size)
        return false;
    struct fuse_write_out out = {.size = in->size};
    count(&core->counters.requests_native_write, 1);
    count(&core->counters.bytes_native_write, in->size);
    (void)device_reply(reader->device, header->unique, &out, sizeof out);
    return true;
}

bool serve_write(struct core *core, struct reader *reader, const struct request *request)
{
    struct fuse_write_in in;
    if (!BODY_GET(request, &in) || request->body_bytes - sizeof in < in.size ||
        in.offset > (uint64_t)INT64_MAX - in.size)
        return false;
    struct lane *base = files_acquire(&core->files, in.fh);
    if (base == NULL)
        return false;
    const uint8_t *data = request->body + sizeof in;
    bool is_answered = false;
    if (atomic_load(&base->is_broken)) {
        (void)device_reply_error(reader->device, request->header.unique, EIO);
        is_answered = true;
    } else if (base->kind == LANE_WRITE) {
        struct write_lane *lane = write_lane_of(base);
        if (in.offset + in.size <= atomic_load(&lane->credit))
            is_answered =
                write_staging(core, reader, lane, &request->header, &in, data);
        else
            write_lane_note(lane, in.offset, data, in.size);
    }
    lane_release(base);
    return is_answered;
}

/* Let the owner make the file longer: it has no FALLOCATE, but a SETATTR. */
static void forward_as_size(struct core *core, struct reader *reader,
                            const struct request *request, const struct fuse_fallocate_in *in)
{
    uint8_t bytes[IN_HEADER + sizeof(struct fuse_setattr_in)];
    struct fuse_in_header header = request->header;
    header.opcode = FUSE_SETATTR;
    header.len = sizeof bytes;
    struct fuse_setattr_in setattr = {
        .valid = FATTR_SIZE | FATTR_FH,
        .fh = in->fh,
        .size = in->offset + in->length,
    };
    memcpy(bytes, &header, sizeof header);
    memcpy(bytes + sizeof header, &setattr, sizeof setattr);
    struct request changed = {
        .header = header,
        .bytes = bytes,
        .nbytes = sizeof bytes,
        .body = bytes + IN_HEADER,
        .body_bytes = sizeof setattr,
        .is_fallocate = true,
    };
    requests_forward(core, reader, &changed);
}

/* Allocate in the staging file; returns 0 or an errno. */
static int allocate(struct reader *reader, struct write_lane *lane,
                    const struct fuse_in_header *header, const struct fuse_fallocate_in *in)
{
    uint64_t end = in->offset + in->length;
    reader_begin_job(reader, header, in->length);
    int status = fallocate(lane->fd, (int)in->mode, (off_t)in->offset, (off_t)in->length) == 0
                     ? 0
                     : errno;
    if (!reader_end_job(reader)) {
        write_lane_break_hash(lane);
        return -1;
    }
    if (status == 0 && !(in->mode & FALLOC_FL_KEEP_SIZE)) {
        pthread_mutex_lock(&lane->lock);
        if (end > lane->next)
            lane->is_sequential = false; /* zeroes that nobody hashed */
        if (end > lane->high_water)
            lane->high_water = end;
        pthread_mutex_unlock(&lane->lock);
    }
    return status;
}

bool serve_fallocate(struct core *core, struct reader *reader, const struct request *request)
{
    struct fuse_fallocate_in in;
    if (!BODY_GET(request, &in))
        return false;
    int error = EOPNOTSUPP;
    bool is_forwarded = false;
    struct lane *base = files_acquire(&core->files, in.fh);
    if (in.length == 0 || in.offset > (uint64_t)INT64_MAX ||
        in.length > (uint64_t)INT64_MAX - in.offset) {
        error = EINVAL;
    } else if (base != NULL && atomic_load(&base->is_broken)) {
        error = EIO;
    } else if (base != NULL && base->kind == LANE_WRITE &&
               (in.mode == 0 || in.mode == FALLOC_FL_KEEP_SIZE)) {
        struct write_lane *lane = write_lane_of(base);
        struct stat status;
        uint64_t end = in.offset + in.length;
        if (end <= atomic_load(&lane->credit))
            error = allocate(reader, lane, &request->header, &in);
        else if (in.mode == 0 && fstat(lane->fd, &status) == 0) {
            is_forwarded = end > (uint64_t)status.st_size;
            error = 0; /* what is inside the file was accounted when it was written */
        }
    }
    if (is_forwarded)
        forward_as_size(core, reader, request, &in);
    else if (error >= 0)
        (void)device_reply_error(reader->device, request->header.unique, error);
    if (base != NULL)
        lane_release(base);
    return true;
}
