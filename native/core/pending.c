#include "pending.h"

#include "log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint32_t *bucket_of(struct pending *pending, uint64_t unique)
{
    return &pending->buckets[(unique >> 1) % PENDING_BUCKETS];
}

static uint32_t find(struct pending *pending, uint64_t unique)
{
    uint32_t at = *bucket_of(pending, unique);
    while (at != 0 && pending->entries[at].request.unique != unique)
        at = pending->entries[at].chain;
    return at;
}

int pending_create(struct pending *pending)
{
    memset(pending, 0, sizeof *pending);
    pending->entries = calloc(PENDING_MAX + 1, sizeof *pending->entries);
    if (pending->entries == NULL)
        return -ENOMEM;
    for (uint32_t i = 1; i < PENDING_MAX; i++)
        pending->entries[i].chain = i + 1;
    pending->free = 1;
    return -pthread_mutex_init(&pending->lock, NULL);
}

void pending_destroy(struct pending *pending)
{
    free(pending->entries);
    (void)pthread_mutex_destroy(&pending->lock);
}

static bool was_interrupted(struct pending *pending, uint64_t unique)
{
    for (unsigned i = 0; pending->early_count > 0 && i < INTERRUPTS_KEPT; i++) {
        if (pending->early[i] == unique) {
            pending->early[i] = 0;
            pending->early_count--;
            return true;
        }
    }
    return false;
}

static void insert(struct pending *pending, const struct pending_request *request)
{
    uint32_t at = pending->free;
    struct pending_entry *entry = &pending->entries[at];
    struct pending_entry *head = &pending->entries[0];
    uint32_t *bucket = bucket_of(pending, request->unique);
    pending->free = entry->chain;
    entry->request = *request;
    entry->state = PENDING_QUEUED;
    entry->chain = *bucket;
    *bucket = at;
    entry->newer = 0;
    entry->older = head->older;
    pending->entries[head->older].newer = at;
    head->older = at;
    atomic_fetch_add(&pending->waiting, 1);
    if (request->interrupted_ns != 0)
        atomic_fetch_add(&pending->interrupted, 1);
}

/* It no longer waits. */
static void uncount(struct pending *pending, const struct pending_entry *entry)
{
    atomic_fetch_sub(&pending->waiting, 1);
    if (entry->request.interrupted_ns != 0)
        atomic_fetch_sub(&pending->interrupted, 1);
}

static void drop(struct pending *pending, uint32_t at)
{
    struct pending_entry *entry = &pending->entries[at];
    uint32_t *link = bucket_of(pending, entry->request.unique);
    while (*link != at)
        link = &pending->entries[*link].chain;
    *link = entry->chain;
    pending->entries[entry->older].newer = entry->newer;
    pending->entries[entry->newer].older = entry->older;
    if (entry->state != PENDING_ANSWERED)
        uncount(pending, entry);
    entry->state = PENDING_FREE;
    entry->chain = pending->free;
    pending->free = at;
}

int pending_add(struct pending *pending, const struct pending_request *request)
{
    int status = 0;
    struct pending_request noted = *request;
    pthread_mutex_lock(&pending->lock);
    if (was_interrupted(pending, request->unique))
        noted.interrupted_ns = now_ns();
    if (pending->free == 0)
        status = -ENOMEM;
    else if (find(pending, request->unique) != 0)
        status = -EINVAL;
    else
        insert(pending, &noted);
    pthread_mutex_unlock(&pending->lock);
    return status;
}

static bool change_state(struct pending *pending, uint64_t unique, enum pending_state from,
                         enum pending_state to)
{
    pthread_mutex_lock(&pending->lock);
    uint32_t at = find(pending, unique);
    bool is_found = at != 0 && pending->entries[at].state == from;
    if (is_found)
        pending->entries[at].state = to;
    pthread_mutex_unlock(&pending->lock);
    return is_found;
}

bool pending_send(struct pending *pending, uint64_t unique)
{
    return change_state(pending, unique, PENDING_QUEUED, PENDING_SENT);
}

void pending_unsend(struct pending *pending, uint64_t unique)
{
    if (change_state(pending, unique, PENDING_SENT, PENDING_QUEUED))
        return;
    /* Answered meanwhile: no late reply will come. */
    pthread_mutex_lock(&pending->lock);
    uint32_t at = find(pending, unique);
    if (at != 0 && pending->entries[at].state == PENDING_ANSWERED)
        drop(pending, at);
    pthread_mutex_unlock(&pending->lock);
}

enum taken pending_take(struct pending *pending, uint64_t unique,
                        struct pending_request *request)
{
    enum taken taken = TAKEN_NONE;
    pthread_mutex_lock(&pending->lock);
    uint32_t at = find(pending, unique);
    /* What was never sent cannot be answered: a confused owner. */
    if (at != 0 && pending->entries[at].state != PENDING_QUEUED) {
        *request = pending->entries[at].request;
        taken = pending->entries[at].state == PENDING_SENT ? TAKEN_OPEN : TAKEN_LATE;
        drop(pending, at);
    }
    pthread_mutex_unlock(&pending->lock);
    return taken;
}

/* REQUIRES: the lock. */
static bool answer(struct pending *pending, uint32_t at, struct pending_request *request)
{
    struct pending_entry *entry = &pending->entries[at];
    if (entry->state == PENDING_ANSWERED)
        return false;
    *request = entry->request;
    if (entry->state == PENDING_QUEUED) {
        drop(pending, at); /* the sender will find nothing and not send it */
    } else {
        entry->state = PENDING_ANSWERED;
        uncount(pending, entry);
    }
    return true;
}

bool pending_answer(struct pending *pending, uint64_t unique, struct pending_request *request)
{
    pthread_mutex_lock(&pending->lock);
    uint32_t at = find(pending, unique);
    bool is_ours = at != 0 && answer(pending, at, request);
    pthread_mutex_unlock(&pending->lock);
    return is_ours;
}

void pending_interrupt(struct pending *pending, uint64_t unique, int64_t now)
{
    pthread_mutex_lock(&pending->lock);
    uint32_t at = find(pending, unique);
    struct pending_entry *entry = &pending->entries[at];
    if (at == 0) {
        unsigned slot = pending->early_at++ % INTERRUPTS_KEPT;
        if (pending->early[slot] == 0)
            pending->early_count++;
        pending->early[slot] = unique;
    } else if (entry->state != PENDING_ANSWERED && entry->request.interrupted_ns == 0) {
        entry->request.interrupted_ns = now;
        atomic_fetch_add(&pending->interrupted, 1);
    }
    pthread_mutex_unlock(&pending->lock);
}

size_t pending_interrupted(struct pending *pending, struct pending_request *requests, size_t room)
{
    size_t count = 0;
    if (atomic_load(&pending->interrupted) == 0)
        return 0;
    pthread_mutex_lock(&pending->lock);
    for (uint32_t at = pending->entries[0].newer; at != 0 && count < room;
         at = pending->entries[at].newer) {
        const struct pending_entry *entry = &pending->entries[at];
        if (entry->state != PENDING_ANSWERED && entry->request.interrupted_ns != 0)
            requests[count++] = entry->request;
    }
    pthread_mutex_unlock(&pending->lock);
    return count;
}

size_t pending_overdue(struct pending *pending, int64_t now, struct pending_request *requests,
                       size_t room)
{
    size_t count = 0;
    pthread_mutex_lock(&pending->lock);
    uint32_t next;
    for (uint32_t at = pending->entries[0].newer; at != 0 && count < room; at = next) {
        next = pending->entries[at].newer;
        if (pending->entries[at].request.deadline_ns <= now &&
            answer(pending, at, &requests[count]))
            count++;
    }
    pthread_mutex_unlock(&pending->lock);
    return count;
}

size_t pending_drain(struct pending *pending, bool is_all, struct pending_request *requests,
                     size_t room)
{
    size_t count = 0;
    pthread_mutex_lock(&pending->lock);
    uint32_t next;
    for (uint32_t at = pending->entries[0].newer; at != 0 && count < room; at = next) {
        const struct pending_entry *entry = &pending->entries[at];
        next = entry->newer;
        if (entry->state == PENDING_QUEUED && !is_all)
            continue;
        if (entry->state != PENDING_ANSWERED)
            requests[count++] = entry->request;
        drop(pending, at);
    }
    pthread_mutex_unlock(&pending->lock);
    return count;
}
