#include "sockets.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WANTED_BYTES = 8 << 20, DESCRIPTORS_MAX = 8 };
/* What the kernel keeps of a socket's buffer for itself: unix_dgram_sendmsg(). */
enum { SOCKET_OVERHEAD = 32 };

static void enlarge(int fd)
{
    int wanted = WANTED_BYTES;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &wanted, sizeof wanted) != 0)
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &wanted, sizeof wanted);
}

int sockets_pair(int ends[2])
{
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
        return -errno;
    enlarge(ends[0]);
    enlarge(ends[1]);
    return 0;
}

size_t sockets_message_max(int fd)
{
    int type = 0;
    int nbytes = 0;
    socklen_t length = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) != 0 || type != SOCK_SEQPACKET)
        return 0;
    length = sizeof nbytes;
    if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &nbytes, &length) != 0 || nbytes <= SOCKET_OVERHEAD)
        return 0;
    return (size_t)nbytes - SOCKET_OVERHEAD;
}

int sockets_send_nowait(int fd, const void *message, size_t nbytes)
{
    ssize_t sent;
    do
        sent = send(fd, message, nbytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

/* Keep the first descriptor of a message, close the others. */
static int keep_first(struct msghdr *message)
{
    int kept = -1;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL;
         part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (kept < 0)
                kept = fd;
            else
                (void)close(fd);
        }
    }
    return kept;
}

int64_t sockets_receive(int fd, void *buffer, size_t room, int *passed)
{
    _Alignas(struct cmsghdr) char space[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    struct iovec part = {.iov_base = buffer, .iov_len = room};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    message.msg_control = space;
    message.msg_controllen = sizeof space;
    ssize_t received = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    if (received < 0)
        return -errno;
    *passed = keep_first(&message);
    if (message.msg_flags & MSG_TRUNC) {
        if (*passed >= 0)
            (void)close(*passed);
        *passed = -1;
        return -EMSGSIZE;
    }
    return received;
}
