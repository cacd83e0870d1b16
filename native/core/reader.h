/* Reader threads. A request that a reader answers itself is its job: the watchdog and interrupts
 * may answer it in the reader's place; whoever ends the job answers. */
#ifndef CORE_READER_H
#define CORE_READER_H

#include "core.h"

/* Start one more; -ENFILE when there are READERS_MAX. */
int reader_start(struct core *core);

/* Take readers and the pump out of a blocked read, at the end. */
void reader_kick_all(struct core *core);

/* Give a reader its buffers, without a thread; 0 or -errno. */
int reader_prepare(struct reader *reader, struct core *core, int device);
void reader_dispose(struct reader *reader);

void reader_begin_job(struct reader *reader, const struct fuse_in_header *header,
                      uint64_t nbytes);

/* The same with another deadline than the mount's. */
void reader_begin_job_within(struct reader *reader, const struct fuse_in_header *header,
                             uint64_t nbytes, uint32_t deadline_ms);

/* Whether the job was still ours to answer. */
bool reader_end_job(struct reader *reader);

/* Whether a reader is at the job `unique`, and for which thread. */
bool reader_find_job(struct core *core, uint64_t unique, uint32_t *pid);

/* Answer the job `unique` of whichever reader has it. */
bool reader_answer_job(struct core *core, uint64_t unique, int error);

/* Answer jobs that are overdue; returns how many readers are stuck for the first time. */
unsigned reader_answer_overdue(struct core *core, int64_t now);

#endif
