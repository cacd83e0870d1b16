#include "undo.h"

static struct fuse_in_header own_header(struct core *core, uint32_t opcode, uint64_t nodeid,
                                        size_t nbytes)
{
    return (struct fuse_in_header){
        .len = (uint32_t)nbytes,
        .opcode = opcode,
        .unique = UNIQUE_OWN | (2 * atomic_fetch_add(&core->own_unique, 1)),
        .nodeid = nodeid,
    };
}

static void send_own(struct core *core, const void *message, size_t nbytes)
{
    static struct log_limit limit;
    int status = link_send(&core->link, 0, message, nbytes);
    if (status != 0)
        log_limited(&limit, "the owner was not told to take back: %s", strerror(-status));
}

static void send_release(struct core *core, uint32_t opcode, uint64_t nodeid, uint64_t fh,
                         uint32_t flags)
{
    struct {
        struct fuse_in_header header;
        struct fuse_release_in body;
    } message = {.body = {.fh = fh, .flags = flags}};
    message.header = own_header(core, opcode, nodeid, sizeof message);
    send_own(core, &message, sizeof message);
}

static void send_forget(struct core *core, uint64_t nodeid)
{
    struct {
        struct fuse_in_header header;
        struct fuse_forget_in body;
    } message = {.body = {.nlookup = 1}};
    if (nodeid == 0)
        return;
    message.header = own_header(core, FUSE_FORGET, nodeid, sizeof message);
    send_own(core, &message, sizeof message);
}

static bool is_dot(const uint8_t *name, uint32_t length)
{
    return length > 0 && name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.'));
}

/* Each entry of a READDIRPLUS but . and .. was a lookup. */
static void forget_entries(struct core *core, const uint8_t *bytes, size_t nbytes)
{
    size_t at = 0;
    while (at < nbytes && nbytes - at >= FUSE_NAME_OFFSET_DIRENTPLUS) {
        struct fuse_direntplus entry;
        memcpy(&entry, bytes + at, FUSE_NAME_OFFSET_DIRENTPLUS);
        size_t room = nbytes - at - FUSE_NAME_OFFSET_DIRENTPLUS;
        if (entry.dirent.namelen > room)
            return;
        if (!is_dot(bytes + at + FUSE_NAME_OFFSET_DIRENTPLUS, entry.dirent.namelen))
            send_forget(core, entry.entry_out.nodeid);
        at += FUSE_DIRENTPLUS_SIZE(&entry);
    }
}

void undo_reply(struct core *core, const struct pending_request *request, const uint8_t *bytes,
                size_t nbytes)
{
    const uint8_t *body = bytes + OUT_HEADER;
    size_t body_bytes = nbytes - OUT_HEADER;
    const size_t entry_bytes = sizeof(struct fuse_entry_out);
    switch (request->opcode) {
    case FUSE_OPEN:
    case FUSE_OPENDIR:
        if (body_bytes >= sizeof(struct fuse_open_out))
            send_release(core, request->opcode == FUSE_OPEN ? FUSE_RELEASE : FUSE_RELEASEDIR,
                         request->nodeid, load64(body), request->open_flags);
        break;
    case FUSE_CREATE:
    case FUSE_TMPFILE:
        if (body_bytes >= entry_bytes + sizeof(struct fuse_open_out)) {
            send_release(core, FUSE_RELEASE, load64(body), load64(body + entry_bytes),
                         request->open_flags);
            send_forget(core, load64(body));
        }
        break;
    case FUSE_LOOKUP:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_SYMLINK:
    case FUSE_LINK:
        if (body_bytes >= entry_bytes)
            send_forget(core, load64(body));
        break;
    case FUSE_READDIRPLUS:
        forget_entries(core, body, body_bytes);
        break;
    default:
        break;
    }
}
