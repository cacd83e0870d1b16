#include "mount.h"

#include "log.h"
#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* Mount by system call: 0, or -errno. */
static int mount_directly(const char *path, const struct options *options, int fd)
{
    char type[80];
    char data[OPTION_TEXT_MAX + 128];
    (void)snprintf(type, sizeof type, *options->subtype ? "fuse.%s" : "fuse", options->subtype);
    (void)snprintf(data, sizeof data, "fd=%d,rootmode=40000,user_id=%u,group_id=%u%s%s", fd,
                   (unsigned)getuid(), (unsigned)getgid(), *options->kernel ? "," : "",
                   options->kernel);
    return mount(options->fsname, path, type, options->flags, data) == 0 ? 0 : -errno;
}

/* Run fusermount3; `commfd` (or -1) is what it answers on. Returns its pid or -errno. */
static int spawn_helper(char *const arguments[], int commfd)
{
    char variable[32];
    (void)snprintf(variable, sizeof variable, "_FUSE_COMMFD=%d", commfd);
    size_t count = 0;
    while (environ[count] != NULL)
        count++;
    char **environment = calloc(count + 2, sizeof *environment);
    if (environment == NULL)
        return -ENOMEM;
    memcpy(environment, environ, count * sizeof *environment);
    environment[count] = commfd >= 0 ? variable : NULL;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    sigemptyset(&none);
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawnattr_init(&attributes);
    /* Onto itself: the child's copy loses its close-on-exec flag. */
    if (commfd >= 0)
        (void)posix_spawn_file_actions_adddup2(&actions, commfd, commfd);
    (void)posix_spawnattr_setsigmask(&attributes, &none);
    (void)posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
    pid_t pid = 0;
    int status =
        posix_spawnp(&pid, "fusermount3", &actions, &attributes, arguments, environment);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)posix_spawnattr_destroy(&attributes);
    free(environment);
    return status == 0 ? pid : -status;
}

static bool wait_helper(pid_t pid)
{
    int status = 0;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return false;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* Mount with fusermount3's help: the descriptor, or -1 after a line on standard error. */
static int mount_by_helper(const char *path, const struct options *options)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        log_line("mount failed: %s: %s", path, strerror(errno));
        return -1;
    }
    char *arguments[] = {"fusermount3", "-o", (char *)options->helper, "--", (char *)path, NULL};
    int pid = spawn_helper(arguments, ends[0]);
    (void)close(ends[0]);
    int fd = -1;
    char byte;
    if (pid > 0) {
        int64_t received;
        do
            received = sockets_receive(ends[1], &byte, sizeof byte, &fd);
        while (received == -EINTR);
        if (received <= 0)
            fd = -1;
        /* It may stay to unmount on our end (auto_unmount) only if asked to, which we do not. */
        if (!wait_helper(pid) && fd >= 0) {
            (void)close(fd);
            fd = -1;
        }
    }
    (void)close(ends[1]);
    if (pid < 0)
        log_line("mount failed: %s: Operation not permitted, and fusermount3 cannot be run: %s",
                 path, strerror(-pid));
    else if (fd < 0)
        log_line("mount failed: %s: fusermount3 refused; the reason is above", path);
    return fd;
}

/* Undo the octal escapes of mountinfo in place. */
static void unescape(char *text)
{
    char *target = text;
    for (char *at = text; *at != '\0'; at++) {
        if (at[0] == '\\' && at[1] >= '0' && at[1] <= '3' && at[2] != '\0' && at[3] != '\0') {
            *target++ = (char)((at[1] - '0') * 64 + (at[2] - '0') * 8 + (at[3] - '0'));
            at += 3;
        } else {
            *target++ = *at;
        }
    }
    *target = '\0';
}

/* Find the device number in mountinfo: stat() would ask the mount, which nobody serves yet. */
static bool find_device(struct mount *mount)
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (file == NULL)
        return false;
    char *line = NULL;
    size_t room = 0;
    bool is_found = false;
    while (getline(&line, &room, file) > 0) {
        unsigned device_major, device_minor;
        char *path = NULL;
        if (sscanf(line, "%*u %*u %u:%u %*s %ms", &device_major, &device_minor, &path) == 3) {
            unescape(path);
            if (strcmp(path, mount->path) == 0) { /* the last one covers the others */
                mount->device_major = device_major;
                mount->device_minor = device_minor;
                is_found = true;
            }
        }
        free(path);
    }
    free(line);
    (void)fclose(file);
    return is_found;
}

int mount_open(struct mount *mount, const struct options *options)
{
    if (realpath(options->mountpoint, mount->path) == NULL) {
        log_line("mount failed: %s: %s", options->mountpoint, strerror(errno));
        return -1;
    }
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    int status = fd < 0 ? -errno : mount_directly(mount->path, options, fd);
    if (fd < 0 && status != -EPERM && status != -EACCES) {
        log_line("mount failed: /dev/fuse: %s; load the module 'fuse', or give the container it",
                 strerror(-status));
        return -1;
    }
    if (fd < 0 || status == -EPERM) {
        if (fd >= 0)
            (void)close(fd);
        fd = mount_by_helper(mount->path, options);
        if (fd < 0)
            return -1;
        status = fcntl(fd, F_SETFD, FD_CLOEXEC) == 0 ? 0 : -errno;
    }
    if (status != 0) {
        log_line("mount failed: %s: %s", mount->path, strerror(-status));
        (void)close(fd);
        return -1;
    }
    if (!find_device(mount)) {
        log_line("mount failed: %s: not in /proc/self/mountinfo", mount->path);
        (void)mount_detach(mount);
        (void)close(fd);
        return -1;
    }
    return fd;
}

bool mount_detach(const struct mount *mount)
{
    if (umount2(mount->path, MNT_DETACH | UMOUNT_NOFOLLOW) == 0)
        return true;
    if (errno != EPERM)
        return false;
    char *arguments[] = {"fusermount3", "-u", "-z", "-q", "--", (char *)mount->path, NULL};
    int pid = spawn_helper(arguments, -1);
    return pid > 0 && wait_helper(pid);
}

void mount_set_read_ahead(const struct mount *mount, unsigned kilobytes)
{
    char path[80];
    if (kilobytes == 0)
        return;
    (void)snprintf(path, sizeof path, "/sys/class/bdi/%u:%u/read_ahead_kb", mount->device_major,
                   mount->device_minor);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)dprintf(fd, "%u\n", kilobytes);
    (void)close(fd);
}
