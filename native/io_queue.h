/* A queue of transfers between files and memory: at most `depth` under way, by io_uring or by
 * threads; with a buffer for each, aligned for O_DIRECT.
 *
 * Short transfers are resumed. Who stops waiting (a deadline) leaves with `abandon`: what is under
 * way then uses nothing but the queue's own memory, and its places come back when it is done.
 *
 * Thread-safety: one user at a time. */
#ifndef KVFS_IO_QUEUE_H
#define KVFS_IO_QUEUE_H

#include "io_op.h"

#include <stddef.h>

/* What a buffer takes, and what goes past the buffers in one transfer. */
enum { KVFS_IO_PIECE = 1 << 20, KVFS_IO_STRAIGHT = 1 << 22, KVFS_IO_DEPTH_MAX = 1024 };

enum kvfs_io_kind { KVFS_IO_ANY, KVFS_IO_URING, KVFS_IO_THREADS };

struct kvfs_io_queue;

/* Open. KVFS_IO_ANY: io_uring, or threads where the kernel refuses it. Returns 0 or -errno. */
int kvfs_io_queue_open(unsigned depth, enum kvfs_io_kind kind, struct kvfs_io_queue **queue);

enum kvfs_io_kind kvfs_io_queue_kind(const struct kvfs_io_queue *queue);

/* Whether the buffers are pinned for good. */
bool kvfs_io_queue_is_registered(const struct kvfs_io_queue *queue);

/* How many places are taken by what was abandoned; takes note of what is done. */
unsigned kvfs_io_queue_stalled(struct kvfs_io_queue *queue);

/* Take a place; -1: all are taken. */
int kvfs_io_queue_take(struct kvfs_io_queue *queue);

/* The buffer of a place: KVFS_IO_PIECE bytes, page-aligned. */
uint8_t *kvfs_io_queue_buffer(const struct kvfs_io_queue *queue, int place);

/* Give back a place that was not used, or whose operation has ended. */
void kvfs_io_queue_give(struct kvfs_io_queue *queue, int place);

/* Begin an operation at a place. `wanted`: bytes that must be moved; the rest of op->nbytes may
 * lie beyond the end of the file. Transfers are resumed at multiples of `align` only (> 0).
 * Several are submitted together. Returns 0 or -errno: nothing was begun. */
int kvfs_io_queue_push(struct kvfs_io_queue *queue, int place, const struct kvfs_io_op *op,
                       uint32_t wanted, uint32_t align);

/* Wait for an operation to end, at most timeout_ms (< 0: no end). Returns its place, which stays
 * taken, and its status as in status.h; or -ETIME, or what broke the queue. */
int kvfs_io_queue_wait(struct kvfs_io_queue *queue, int timeout_ms, int32_t *status);

/* Stop waiting for all that is under way. REQUIRES: it is all in buffers of the queue. */
void kvfs_io_queue_abandon(struct kvfs_io_queue *queue);

/* Close. What is still under way keeps the memory that it uses, to the end of the process. In a
 * fork of the process that opened it nothing is done. */
void kvfs_io_queue_close(struct kvfs_io_queue *queue);

#endif
