/* /dev/fuse: clones and replies.
 *
 * A reply goes out on the descriptor that its request came from: on another one the kernel does
 * not find the request. Thread-safety: any thread. */
#ifndef CORE_DEVICE_H
#define CORE_DEVICE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Bytes of a body in pieces; `parts[0]` is left free for the header. */
enum { PARTS_MAX = 64 };
struct body {
    struct iovec parts[PARTS_MAX + 1];
    int count; /* of the body's parts, which are parts[1] ... parts[count] */
    size_t nbytes;
};

/* A further descriptor of the same connection, or -errno. */
int device_clone(int fd);

/* Answer a request. All return 0 or -errno: -ENOENT when the kernel no longer waits. */
int device_reply(int fd, uint64_t unique, const void *body, size_t nbytes);
int device_reply_error(int fd, uint64_t unique, int error);
/* REQUIRES: the pages are there: a fault in the write makes the kernel end the request by EIO. */
int device_reply_parts(int fd, uint64_t unique, struct body *body);
/* The message has its header already. */
int device_write(int fd, const void *message, size_t nbytes);

#endif
