#include "replies.h"

#include "device.h"
#include "init.h"
#include "undo.h"
#include "write_lane.h"

#include <errno.h>
#include <fcntl.h>

enum { CREATE_OPEN_OFFSET = sizeof(struct fuse_entry_out), REPLY_SLACK = 64 << 10 };
enum { NOTIFY_CODE_MAX = FUSE_NOTIFY_DELETE };

size_t replies_room(const struct core *core)
{
    return core->payload_max + REPLY_SLACK;
}

/* Where a successful reply carries a fuse_open_out, or 0. */
static size_t open_offset(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_OPEN:
    case FUSE_OPENDIR:
        return OUT_HEADER;
    case FUSE_CREATE:
    case FUSE_TMPFILE:
        return OUT_HEADER + CREATE_OPEN_OFFSET;
    default:
        return 0;
    }
}

/* A handle is about to be the kernel's: note it, and complete the reply of a passthrough one. */
static void note_open(struct core *core, const struct pending_request *request, uint8_t *bytes,
                      size_t nbytes)
{
    size_t at = open_offset(request->opcode);
    if (at == 0 || nbytes < at + sizeof(struct fuse_open_out))
        return;
    struct handle handle = {
        .fh = load64(bytes + at),
        .nodeid = at == OUT_HEADER ? request->nodeid : load64(bytes + OUT_HEADER),
        .open_flags = request->open_flags,
    };
    files_opened(&core->files, &handle, request->opcode == FUSE_OPENDIR);
    uint32_t id = files_backing_id(&core->files, handle.fh);
    if (id == 0)
        return;
    const size_t flags_at = at + offsetof(struct fuse_open_out, open_flags);
    uint32_t flags = load32(bytes + flags_at);
    store32(bytes + flags_at, (flags | OPEN_PASSTHROUGH) & ~(uint32_t)FOPEN_KEEP_CACHE);
    store32(bytes + at + OPEN_BACKING_OFFSET, id);
}

/* The kernel did not take the reply: it never learned of the handle. */
static void forget_open(struct core *core, const struct pending_request *request,
                        const uint8_t *bytes, size_t nbytes)
{
    size_t at = open_offset(request->opcode);
    if (at > 0 && nbytes >= at + sizeof(struct fuse_open_out))
        files_released(&core->files, load64(bytes + at));
}

static void set_size(struct lane *lane, uint64_t size)
{
    write_lane_note_size(write_lane_of(lane), size);
}

/* What the owner did to files that are written here. */
static void note_change(struct core *core, const struct pending_request *request,
                        const struct fuse_out_header *header, const uint8_t *bytes)
{
    bool is_done = header->error == 0;
    if (request->opcode == FUSE_WRITE) {
        uint32_t size = is_done && header->len >= OUT_HEADER + sizeof(struct fuse_write_out)
                            ? load32(bytes + OUT_HEADER)
                            : 0;
        struct lane *lane =
            size == request->argument ? NULL : files_acquire(&core->files, request->fh);
        if (lane == NULL)
            return;
        if (lane->kind == LANE_WRITE)
            write_lane_break_hash(write_lane_of(lane));
        files_leave(&core->files, request->fh, lane);
    } else if (request->opcode == FUSE_SETATTR && is_done && request->argument != UINT64_MAX) {
        files_for_writers(&core->files, request->nodeid, set_size, request->argument);
    }
}

/* Take a reply to the kernel, which waits for it. */
static void deliver(struct core *core, const struct pending_request *request, uint8_t *bytes,
                    size_t nbytes)
{
    static struct log_limit limit;
    struct fuse_out_header header;
    memcpy(&header, bytes, sizeof header);
    note_change(core, request, &header, bytes);
    if (header.error == 0)
        note_open(core, request, bytes, nbytes);
    if (request->opcode == FUSE_INIT && header.error == 0)
        nbytes = init_patch(core, bytes, nbytes);
    /* The owner had pages dropped that the write made stale: not to be read after it. Dirty pages
     * that are written for that cannot wait for it. */
    if (request->opcode == FUSE_WRITE && !(request->open_flags & FUSE_WRITE_CACHE) &&
        notify_push_after(&core->notify, request->device, bytes, nbytes))
        return;
    int status = device_write(request->device, bytes, nbytes);
    if (request->opcode == FUSE_INIT) {
        atomic_store(&core->init.is_answered, true);
        core_wake_main(core);
    }
    if (status == 0)
        return;
    if (header.error == 0) {
        forget_open(core, request, bytes, nbytes);
        undo_reply(core, request, bytes, nbytes);
    }
    if (status != -ENOENT && status != -ENODEV) {
        log_limited(&limit, "reply to request type %u of %zu bytes: %s", request->opcode, nbytes,
                    strerror(-status));
        /* A reply that the kernel cannot read leaves the request waiting. */
        (void)device_reply_error(request->device, request->unique, EIO);
    }
}

static void handle_notification(struct core *core, const struct fuse_out_header *header,
                                const uint8_t *bytes, size_t nbytes)
{
    static struct log_limit limit;
    if (header->error <= 0 || header->error > NOTIFY_CODE_MAX)
        log_limited(&limit, "unknown notification from the owner: %d", header->error);
    else
        notify_push(&core->notify, bytes, nbytes);
}

void replies_handle(struct core *core, uint8_t *bytes, size_t nbytes)
{
    static struct log_limit limit;
    struct fuse_out_header header = {.len = 0};
    if (nbytes >= OUT_HEADER)
        memcpy(&header, bytes, sizeof header);
    if (header.len != nbytes || nbytes < OUT_HEADER) {
        log_limited(&limit, "reply of %zu bytes says that it has %u", nbytes, header.len);
        return;
    }
    if (header.unique == 0) {
        handle_notification(core, &header, bytes, nbytes);
        return;
    }
    if (header.unique & UNIQUE_OWN)
        return;
    struct pending_request request;
    switch (pending_take(&core->pending, header.unique, &request)) {
    case TAKEN_OPEN:
        deliver(core, &request, bytes, nbytes);
        break;
    case TAKEN_LATE:
        note_change(core, &request, &header, bytes);
        if (header.error == 0) {
            forget_open(core, &request, bytes, nbytes);
            undo_reply(core, &request, bytes, nbytes);
        }
        break;
    case TAKEN_NONE:
        break;
    }
}
