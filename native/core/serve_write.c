#include "serve_write.h"

#include "device.h"
#include "write_lane.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
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
        write_lane_note_failure(lane); /* the writer was told so */
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
    files_leave(&core->files, in.fh, base);
    return is_answered;
}

/* Let the owner allocate: pyfuse3 has no FALLOCATE, but a SETXATTR. Its name is empty, which the
 * kernel never sends. */
static void forward_fallocate(struct core *core, struct reader *reader,
                              const struct request *request)
{
    enum { NAME = IN_HEADER + FUSE_COMPAT_SETXATTR_IN_SIZE, VALUE = NAME + 1 };
    uint8_t bytes[VALUE + sizeof(struct fuse_fallocate_in)] = {0};
    struct fuse_in_header header = request->header;
    header.opcode = FUSE_SETXATTR;
    header.len = sizeof bytes;
    memcpy(bytes, &header, sizeof header);
    store32(bytes + IN_HEADER, sizeof(struct fuse_fallocate_in));
    memcpy(bytes + VALUE, request->body, sizeof(struct fuse_fallocate_in));
    struct request changed = {
        .header = header,
        .bytes = bytes,
        .nbytes = sizeof bytes,
        .body = bytes + IN_HEADER,
        .body_bytes = sizeof bytes - IN_HEADER,
    };
    requests_forward(core, reader, &changed);
}

/* 0: the owner may allocate. */
static int check_fallocate(struct core *core, const struct fuse_fallocate_in *in)
{
    if (in->length == 0 || in->offset > (uint64_t)INT64_MAX ||
        in->length > (uint64_t)INT64_MAX - in->offset)
        return EINVAL;
    if (in->mode != 0 && in->mode != FALLOC_FL_KEEP_SIZE)
        return EOPNOTSUPP;
    struct lane *lane = files_acquire(&core->files, in->fh);
    bool is_broken = lane != NULL && atomic_load(&lane->is_broken);
    if (lane != NULL)
        files_leave(&core->files, in->fh, lane);
    return is_broken ? EIO : 0;
}

bool serve_fallocate(struct core *core, struct reader *reader, const struct request *request)
{
    struct fuse_fallocate_in in;
    if (!BODY_GET(request, &in))
        return false;
    int error = check_fallocate(core, &in);
    if (error == 0)
        forward_fallocate(core, reader, request);
    else
        (void)device_reply_error(reader->device, request->header.unique, error);
    return true;
}
