#include "requests.h"

#include "device.h"
#include "init.h"
#include "interrupts.h"
#include "serve_read.h"
#include "serve_write.h"

#include <errno.h>

static bool has_no_reply(uint32_t opcode)
{
    return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_NOTIFY_REPLY;
}

/* Bytes that a request moves: its deadline grows with them. */
static uint64_t moved_bytes(const struct request *request)
{
    struct fuse_read_in read;
    uint32_t opcode = request->header.opcode;
    bool is_reading = opcode == FUSE_READ || opcode == FUSE_READDIR || opcode == FUSE_READDIRPLUS;
    if (is_reading && BODY_GET(request, &read))
        return request->nbytes + read.size;
    return request->nbytes;
}

/* Note what the reply will need of the request. */
static struct pending_request describe(const struct core *core, const struct reader *reader,
                                       const struct request *request)
{
    struct pending_request noted = {
        .unique = request->header.unique,
        .nodeid = request->header.nodeid,
        .opcode = request->header.opcode,
        .argument = UINT64_MAX,
        .pid = request->header.pid,
        .device = reader->device,
        .deadline_ns = core_deadline_ns(core, moved_bytes(request), true),
    };
    struct fuse_open_in open;
    struct fuse_write_in write;
    struct fuse_setattr_in setattr;
    switch (request->header.opcode) {
    case FUSE_OPEN:
    case FUSE_OPENDIR:
    case FUSE_CREATE: /* both structs begin by the flags */
    case FUSE_TMPFILE:
        if (BODY_GET(request, &open))
            noted.open_flags = open.flags;
        break;
    case FUSE_WRITE:
        if (BODY_GET(request, &write)) {
            noted.fh = write.fh;
            noted.argument = write.size;
            noted.open_flags = write.write_flags;
        }
        break;
    case FUSE_SETATTR:
        if (BODY_GET(request, &setattr) && (setattr.valid & FATTR_SIZE))
            noted.argument = setattr.size;
        break;
    default:
        break;
    }
    return noted;
}

/* Mark the offset of a READ for the page cache, of which the owner's library says nothing. */
static size_t mark_read(const struct request *request, uint8_t *bytes, size_t room)
{
    struct fuse_read_in read;
    if (request->header.opcode != FUSE_READ || !BODY_GET(request, &read) ||
        !read_is_for_cache(&read) || request->nbytes > room)
        return 0;
    read.offset |= READ_FOR_CACHE;
    memcpy(bytes, request->bytes, request->nbytes);
    memcpy(bytes + IN_HEADER, &read, sizeof read);
    return request->nbytes;
}

void requests_forward(struct core *core, struct reader *reader, const struct request *request)
{
    static struct log_limit limit;
    uint64_t unique = request->header.unique;
    bool is_noted = !has_no_reply(request->header.opcode);
    count(&core->counters.forwarded, 1);
    if (is_noted) {
        struct pending_request noted = describe(core, reader, request);
        if (pending_add(&core->pending, &noted) != 0) {
            (void)device_reply_error(reader->device, unique, EIO);
            return;
        }
    }
    uint8_t marked[IN_HEADER + sizeof(struct fuse_read_in)];
    size_t nbytes = mark_read(request, marked, sizeof marked);
    int status = link_send(&core->link, is_noted ? unique : 0,
                           nbytes ? marked : request->bytes, nbytes ? nbytes : request->nbytes);
    if (status == 0)
        return;
    log_limited(&limit, "request of %zu bytes not sent to the owner: %s", request->nbytes,
                strerror(-status));
    struct pending_request noted;
    if (is_noted && pending_answer(&core->pending, unique, &noted))
        (void)device_reply_error(reader->device, unique, EIO);
}

/* Answer a LOOKUP of a name that cannot exist. */
static bool serve_lookup(struct core *core, const struct reader *reader,
                         const struct request *request)
{
    uint64_t milliseconds;
    size_t length = strnlen((const char *)request->body, request->body_bytes);
    if (length == request->body_bytes ||
        !filter_excludes(&core->filter, request->header.nodeid, (const char *)request->body,
                         length, &milliseconds))
        return false;
    struct fuse_entry_out entry = {
        .entry_valid = milliseconds / 1000,
        .entry_valid_nsec = (uint32_t)(milliseconds % 1000 * 1000000),
    };
    count(&core->counters.lookups_answered, 1);
    (void)device_reply(reader->device, request->header.unique, &entry, sizeof entry);
    return true;
}

/* A handle whose writer died with its owner fails until it is released. */
static bool serve_broken(struct core *core, const struct reader *reader,
                         const struct request *request)
{
    uint64_t fh;
    if (!BODY_GET(request, &fh))
        return false;
    struct lane *lane = files_acquire(&core->files, fh);
    if (lane == NULL)
        return false;
    bool is_broken = atomic_load(&lane->is_broken);
    files_leave(&core->files, fh, lane);
    if (is_broken)
        (void)device_reply_error(reader->device, request->header.unique, EIO);
    return is_broken;
}

/* A descriptor was closed: there is nothing to tell of one that reads. */
static bool serve_flush(struct core *core, const struct reader *reader,
                        const struct request *request)
{
    struct fuse_flush_in flush;
    if (!BODY_GET(request, &flush) || !files_only_reads(&core->files, flush.fh))
        return serve_broken(core, reader, request);
    (void)device_reply(reader->device, request->header.unique, NULL, 0);
    return true;
}

/* The owner must hear of a RELEASE even if the handle is another's. */
static void note_release(struct core *core, const struct request *request)
{
    struct fuse_release_in release;
    if (!BODY_GET(request, &release))
        return;
    files_released(&core->files, release.fh);
    uint64_t nodeid = request->header.nodeid;
    if (page_cache_has(&core->page_cache, nodeid) && !files_is_open(&core->files, nodeid))
        page_cache_drop(&core->page_cache, nodeid);
}

/* Answer a request here if the core can. */
static bool serve(struct core *core, struct reader *reader, const struct request *request)
{
    switch (request->header.opcode) {
    case FUSE_READ:
        return serve_read(core, reader, request);
    case FUSE_WRITE:
        return serve_write(core, reader, request);
    case FUSE_FALLOCATE:
        return serve_fallocate(core, reader, request);
    case FUSE_LOOKUP:
        return serve_lookup(core, reader, request);
    case FUSE_FLUSH:
        return serve_flush(core, reader, request);
    case FUSE_FSYNC:
        return serve_broken(core, reader, request);
    case FUSE_LSEEK:
        /* The kernel then takes all of a file for data, and asks no more. */
        (void)device_reply_error(reader->device, request->header.unique, ENOSYS);
        return true;
    case FUSE_INTERRUPT:
        interrupts_receive(core, request);
        return true;
    case FUSE_INIT:
        return init_receive(core, reader, request);
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
        note_release(core, request);
        return false;
    default:
        return false;
    }
}

void requests_handle(struct core *core, struct reader *reader, const uint8_t *bytes,
                     size_t nbytes)
{
    static struct log_limit limit;
    struct request request = {.bytes = bytes, .nbytes = nbytes};
    if (nbytes >= IN_HEADER)
        memcpy(&request.header, bytes, IN_HEADER);
    /* Unique 0 would make a notification of the answer. */
    if (nbytes < IN_HEADER || request.header.unique == 0) {
        log_limited(&limit, "request without a header: %zu bytes", nbytes);
        return;
    }
    if (request.header.len != nbytes || (request.header.unique & UNIQUE_OWN)) {
        log_limited(&limit, "request of %zu bytes says that it has %u", nbytes,
                    request.header.len);
        if (!has_no_reply(request.header.opcode))
            (void)device_reply_error(reader->device, request.header.unique, EIO);
        return;
    }
    request.body = bytes + IN_HEADER;
    request.body_bytes = nbytes - IN_HEADER;
    if (!serve(core, reader, &request))
        requests_forward(core, reader, &request);
}
