#include "memory.h"

#include "batch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Newer than the headers of Debian 12. */
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFDIO_POISON
#define UFFD_FEATURE_POISON (1 << 14)
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

int kvfs_memfd_seal(int fd, bool is_read_only)
{
    int seals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
    if (is_read_only)
        seals |= F_SEAL_FUTURE_WRITE;
    return fcntl(fd, F_ADD_SEALS, seals) == 0 ? 0 : -errno;
}

int kvfs_memfd(const char *name, uint64_t nbytes, bool is_final)
{
    if (nbytes > (uint64_t)INT64_MAX)
        return -EFBIG;
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = memfd_create(name, flags);
    /* vm.memfd_noexec=2 insists on the flag, which older kernels do not know. */
    if (fd < 0 && errno == EACCES)
        fd = memfd_create(name, flags | MFD_NOEXEC_SEAL);
    if (fd < 0)
        return -errno;
    /* Who gets a descriptor that only reads could open it anew for more: a memfd's mode is 0777. */
    int status = ftruncate(fd, (off_t)nbytes) == 0 && fchmod(fd, 0600) == 0 ? 0 : -errno;
    if (status == 0 && is_final)
        status = kvfs_memfd_seal(fd, false);
    if (status == 0)
        return fd;
    (void)close(fd);
    return status;
}

static int poison_through(int uffd, uintptr_t address, uint64_t nbytes)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_POISON};
    if (ioctl(uffd, UFFDIO_API, &api) != 0)
        return errno == EINVAL ? -EOPNOTSUPP : -errno;
    struct uffdio_register reg = {.range = {address, nbytes},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_REGISTER, &reg) != 0)
        return -errno;
    /* Only a page that is not mapped yet can be poisoned; a memfd keeps its content. */
    if (madvise((void *)address, nbytes, MADV_DONTNEED) != 0)
        return -errno;
    struct uffdio_poison poison = {.range = {address, nbytes}};
    return ioctl(uffd, (unsigned long)UFFDIO_POISON, &poison) == 0 ? 0 : -errno;
}

int kvfs_poison(uintptr_t address, uint64_t nbytes)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        return -errno;
    int status = poison_through(uffd, address, nbytes);
    /* The poison stays in the page table; other pages must not wait for a handler that is not
     * there, so the registration goes. */
    (void)close(uffd);
    return status;
}

/* 0 if all pages from address on are in memory, 1 if not, -errno. */
static int32_t range_absent(uint64_t address, uint64_t length)
{
    enum { PAGE = 4096, PAGES_MAX = 1024 };
    unsigned char pages[PAGES_MAX];
    uint64_t end = address + length;
    for (uint64_t at = address & ~(uint64_t)(PAGE - 1); at < end;) {
        uint64_t count = (end - at + PAGE - 1) / PAGE;
        if (count > PAGES_MAX)
            count = PAGES_MAX;
        if (mincore((void *)(uintptr_t)at, (size_t)count * PAGE, pages) != 0)
            return -errno;
        for (uint64_t i = 0; i < count; i++)
            if (!(pages[i] & 1))
                return 1;
        at += count * PAGE;
    }
    return 0;
}

size_t kvfs_absent(const void *addresses, const void *lengths, size_t count, void *statuses)
{
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t status = range_absent(kvfs_get64(addresses, i), kvfs_get64(lengths, i));
        found += kvfs_put_status(statuses, i, status);
    }
    return found;
}
