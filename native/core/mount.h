/* Mounting: by mount(2) where the process may, else with fusermount3's help. */
#ifndef CORE_MOUNT_H
#define CORE_MOUNT_H

#include "options.h"

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

struct mount {
    char path[PATH_MAX]; /* resolved */
    unsigned device_major, device_minor; /* as st_dev has them */
};

/* Mount; returns the descriptor of /dev/fuse, or -1 after a line on standard error. */
int mount_open(struct mount *mount, const struct options *options);

/* Take the mount out of the tree; files in use go on. Returns whether it could. */
bool mount_detach(const struct mount *mount);

/* Let the kernel read ahead that far; silently not, where it does not let us. */
void mount_set_read_ahead(const struct mount *mount, unsigned kilobytes);

#endif
