#include "device.h"

#include "protocol.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

int device_clone(int fd)
{
    int clone = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (clone < 0)
        return -errno;
    uint32_t source = (uint32_t)fd;
    if (ioctl(clone, FUSE_DEV_IOC_CLONE, &source) != 0) {
        int status = -errno;
        (void)close(clone);
        return status;
    }
    return clone;
}

static int write_parts(int fd, const struct iovec *parts, int count)
{
    ssize_t written;
    do
        written = writev(fd, parts, count);
    while (written < 0 && errno == EINTR);
    return written < 0 ? -errno : 0;
}

int device_reply(int fd, uint64_t unique, const void *body, size_t nbytes)
{
    struct fuse_out_header header = {.len = (uint32_t)(OUT_HEADER + nbytes), .unique = unique};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)body, nbytes}};
    return write_parts(fd, parts, nbytes > 0 ? 2 : 1);
}

int device_reply_error(int fd, uint64_t unique, int error)
{
    struct fuse_out_header header = {.len = OUT_HEADER, .error = -error, .unique = unique};
    struct iovec part = {&header, sizeof header};
    return write_parts(fd, &part, 1);
}

int device_reply_parts(int fd, uint64_t unique, struct body *body)
{
    struct fuse_out_header header = {
        .len = (uint32_t)(OUT_HEADER + body->nbytes),
        .unique = unique,
    };
    body->parts[0] = (struct iovec){&header, sizeof header};
    return write_parts(fd, body->parts, body->count + 1);
}

int device_write(int fd, const void *message, size_t nbytes)
{
    struct iovec part = {(void *)message, nbytes};
    return write_parts(fd, &part, 1);
}
