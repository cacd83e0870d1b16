"""The mount: a pool's tree through FUSE, by kvfs-core, pyfuse3 and trio.

Layer: L5.

    mount.py        mount and unmount, in the foreground or in a thread
    mountpoint.py   what the kernel says of mountpoints: checks, stale mounts, read-ahead
    operations.py   request handlers of names and attributes: thin, they call kvfs.tree
    file_operations.py  request handlers of open files: thin, they call kvfs.files
    opening.py      opens: which lane, and what goes together in the kernel
    lanes.py        what kvfs-core is given, so that reads need not come here
    reflink_views.py  scattered content as one file that the kernel can read
    core.py         kvfs-core: started, watched, ended
    core_client.py  its control messages
    name_filter.py  names that may exist, so that it can deny the others
    requests.py     deadline, errors to errno, counts
    handles.py      open files and directories, inode numbers, lookup counts
    attributes.py   nodes to stat
    xattrs.py       user.kvfs.*
    status.py       /.kvfs/

pyfuse3 is imported nowhere else.
"""
