#include "files.h"

#include "log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int files_create(struct files *files, struct backings *backings)
{
    memset(files, 0, sizeof *files);
    files->backings = backings;
    return -pthread_rwlock_init(&files->lock, NULL);
}

void files_destroy(struct files *files)
{
    for (size_t i = 0; i < FILE_BUCKETS; i++) {
        while (files->buckets[i] != NULL) {
            struct file *file = files->buckets[i];
            files->buckets[i] = file->next;
            if (file->lane != NULL)
                file->lane->destroy(file->lane);
            if (file->backing != NULL)
                backings_release(files->backings, file->backing);
            free(file);
        }
    }
    (void)pthread_rwlock_destroy(&files->lock);
}

static struct file **find_link(struct files *files, uint64_t fh)
{
    struct file **link = &files->buckets[fh % FILE_BUCKETS];
    while (*link != NULL && (*link)->fh != fh)
        link = &(*link)->next;
    return link;
}

/* REQUIRES: the lock, for writing. */
static struct file *find_or_make(struct files *files, uint64_t fh)
{
    struct file **link = find_link(files, fh);
    if (*link == NULL && files->count < FILES_MAX) {
        struct file *file = calloc(1, sizeof *file);
        if (file != NULL) {
            file->fh = fh;
            *link = file;
            files->count++;
        }
    }
    return *link;
}

/* Forget a file that is nothing to anybody. REQUIRES: the lock, for writing. */
static void drop_if_unused(struct files *files, struct file **link)
{
    struct file *file = *link;
    if (file == NULL || file->open_count > 0 || file->lane != NULL || file->backing != NULL)
        return;
    *link = file->next;
    files->count--;
    free(file);
}

int files_begin(struct files *files, uint64_t fh, struct lane *lane)
{
    int status = 0;
    pthread_rwlock_wrlock(&files->lock);
    struct file *file = find_or_make(files, fh);
    if (file == NULL) {
        status = -ENFILE;
    } else if (file->lane != NULL) {
        status = -EEXIST;
    } else {
        lane->generation = atomic_load(&files->generation);
        file->nodeid = lane->nodeid;
        file->lane = lane;
    }
    pthread_rwlock_unlock(&files->lock);
    return status;
}

struct lane *files_building(struct files *files, uint64_t fh)
{
    pthread_rwlock_rdlock(&files->lock);
    struct file *file = *find_link(files, fh);
    struct lane *lane = file == NULL ? NULL : file->lane;
    if (lane != NULL && (lane->is_served || lane->is_closed))
        lane = NULL;
    pthread_rwlock_unlock(&files->lock);
    return lane;
}

void files_serve(struct files *files, uint64_t fh)
{
    pthread_rwlock_wrlock(&files->lock);
    struct file *file = *find_link(files, fh);
    if (file != NULL && file->lane != NULL)
        file->lane->is_served = true;
    pthread_rwlock_unlock(&files->lock);
}

struct lane *files_acquire(struct files *files, uint64_t fh)
{
    pthread_rwlock_rdlock(&files->lock);
    struct file *file = *find_link(files, fh);
    struct lane *lane = file == NULL ? NULL : file->lane;
    if (lane != NULL && lane->is_served && !lane->is_closed)
        atomic_fetch_add(&lane->users, 1);
    else
        lane = NULL;
    pthread_rwlock_unlock(&files->lock);
    return lane;
}

/* Take the lane of a file away. REQUIRES: the lock, for writing. */
static struct lane *take_lane(struct files *files, struct file *file)
{
    struct lane *lane = file->lane;
    file->lane = NULL;
    if (file->is_left)
        atomic_fetch_sub(&files->left_count, 1);
    file->is_left = false;
    return lane;
}

/* Wait until a closed lane has no users. */
static bool wait_unused(const struct lane *lane, int64_t wait_ms)
{
    int64_t end = now_ns() + wait_ms * NS_PER_MS;
    while (atomic_load_explicit(&lane->users, memory_order_acquire) > 0) {
        if (now_ns() >= end)
            return false;
        sleep_ms(1);
    }
    return true;
}

int files_close(struct files *files, uint64_t fh, int64_t wait_ms, struct lane **lane)
{
    *lane = NULL;
    pthread_rwlock_wrlock(&files->lock);
    struct file *file = *find_link(files, fh);
    struct lane *closed = file == NULL ? NULL : file->lane;
    if (closed != NULL)
        closed->is_closed = true;
    pthread_rwlock_unlock(&files->lock);
    if (closed != NULL && !wait_unused(closed, wait_ms))
        return -EBUSY;
    struct backing *backing = NULL;
    pthread_rwlock_wrlock(&files->lock);
    struct file **link = find_link(files, fh);
    if (*link != NULL && (*link)->lane == closed) {
        backing = (*link)->backing;
        *lane = take_lane(files, *link);
        (*link)->backing = NULL;
        drop_if_unused(files, link);
    }
    pthread_rwlock_unlock(&files->lock);
    if (backing != NULL)
        backings_release(files->backings, backing);
    return 0;
}

int files_set_backing(struct files *files, uint64_t fh, uint64_t nodeid, struct backing *backing)
{
    int status = 0;
    pthread_rwlock_wrlock(&files->lock);
    struct file *file = find_or_make(files, fh);
    if (file == NULL) {
        status = -ENFILE;
    } else if (file->backing != NULL) {
        status = -EEXIST;
    } else {
        file->nodeid = nodeid;
        file->backing = backing;
    }
    pthread_rwlock_unlock(&files->lock);
    return status;
}

uint32_t files_backing_id(struct files *files, uint64_t fh)
{
    pthread_rwlock_rdlock(&files->lock);
    struct file *file = *find_link(files, fh);
    uint32_t id = file == NULL || file->backing == NULL ? 0 : file->backing->id;
    pthread_rwlock_unlock(&files->lock);
    return id;
}

void files_opened(struct files *files, const struct handle *handle, bool is_directory)
{
    pthread_rwlock_wrlock(&files->lock);
    struct file *file = find_or_make(files, handle->fh);
    if (file != NULL) {
        file->nodeid = handle->nodeid;
        file->open_flags = handle->open_flags;
        file->is_directory = is_directory;
        file->open_count++;
    }
    pthread_rwlock_unlock(&files->lock);
}

bool files_only_reads(struct files *files, uint64_t fh)
{
    pthread_rwlock_rdlock(&files->lock);
    const struct file *file = *find_link(files, fh);
    bool only_reads = file != NULL && (file->backing != NULL ||
                                       (file->lane != NULL && file->lane->kind == LANE_READ));
    pthread_rwlock_unlock(&files->lock);
    return only_reads;
}

bool files_is_open(struct files *files, uint64_t nodeid)
{
    bool is_open = false;
    pthread_rwlock_rdlock(&files->lock);
    for (size_t i = 0; i < FILE_BUCKETS && !is_open; i++)
        for (struct file *file = files->buckets[i]; file != NULL && !is_open; file = file->next)
            is_open = file->nodeid == nodeid && file->open_count > 0;
    pthread_rwlock_unlock(&files->lock);
    return is_open;
}

/* Take from a released file what its owner need not close: all but what it writes itself. */
static struct lane *take_released(struct files *files, struct file *file,
                                  struct backing **backing)
{
    if (file->open_count > 0)
        return NULL;
    *backing = file->backing;
    file->backing = NULL;
    struct lane *lane = file->lane;
    if (lane == NULL)
        return NULL;
    bool is_wanted = lane->kind == LANE_WRITE &&
                     lane->generation == atomic_load(&files->generation);
    /* A table that is being filled, or a close that waits, is the control thread's. */
    if (is_wanted || !lane->is_served || lane->is_closed)
        return NULL;
    if (!file->is_left)
        atomic_fetch_add(&files->left_count, 1);
    file->is_left = true;
    /* A user that is still there sees the count after it has left; else it has left before. */
    return atomic_load(&lane->users) > 0 ? NULL : take_lane(files, file);
}

static void release(struct files *files, uint64_t fh, uint32_t opens)
{
    struct lane *lane = NULL;
    struct backing *backing = NULL;
    pthread_rwlock_wrlock(&files->lock);
    struct file **link = find_link(files, fh);
    if (*link != NULL) {
        if ((*link)->open_count >= opens)
            (*link)->open_count -= opens;
        lane = take_released(files, *link, &backing);
        drop_if_unused(files, link);
    }
    pthread_rwlock_unlock(&files->lock);
    if (lane != NULL)
        lane->destroy(lane);
    if (backing != NULL)
        backings_release(files->backings, backing);
}

void files_released(struct files *files, uint64_t fh)
{
    release(files, fh, 1);
}

void files_leave(struct files *files, uint64_t fh, struct lane *lane)
{
    atomic_fetch_sub(&lane->users, 1);
    /* From here on the lane may be gone. */
    if (atomic_load(&files->left_count) > 0)
        release(files, fh, 0);
}

/* What an owner installed for an open that it never answered. REQUIRES: the lock, for writing. */
static void drop_unopened(struct files *files, struct file **link)
{
    struct file *file = *link;
    if (file->lane != NULL && atomic_load(&file->lane->users) == 0) {
        struct lane *lane = take_lane(files, file);
        lane->destroy(lane);
    }
    if (file->backing != NULL)
        backings_release(files->backings, file->backing);
    file->backing = NULL;
    drop_if_unused(files, link);
}

void files_next_owner(struct files *files)
{
    pthread_rwlock_wrlock(&files->lock);
    atomic_fetch_add(&files->generation, 1);
    for (size_t i = 0; i < FILE_BUCKETS; i++) {
        for (struct file **link = &files->buckets[i]; *link != NULL;) {
            struct file *file = *link;
            if (file->lane != NULL && file->lane->kind == LANE_WRITE)
                atomic_store(&file->lane->is_broken, true);
            if (file->open_count == 0)
                drop_unopened(files, link);
            if (*link == file)
                link = &file->next;
        }
    }
    pthread_rwlock_unlock(&files->lock);
}

void files_for_writers(struct files *files, uint64_t nodeid,
                       void (*function)(struct lane *lane, uint64_t argument), uint64_t argument)
{
    pthread_rwlock_rdlock(&files->lock);
    for (size_t i = 0; i < FILE_BUCKETS; i++)
        for (struct file *file = files->buckets[i]; file != NULL; file = file->next)
            if (file->lane != NULL && file->lane->kind == LANE_WRITE && file->nodeid == nodeid)
                function(file->lane, argument);
    pthread_rwlock_unlock(&files->lock);
}

static uint32_t lane_code(const struct file *file)
{
    uint32_t code = file->backing != NULL ? LANE_BACKING : LANE_NONE;
    if (file->lane != NULL && file->lane->is_served)
        code = (uint32_t)file->lane->kind;
    return code;
}

static int compare_handles(const void *left, const void *right)
{
    uint64_t a = ((const struct handle *)left)->fh;
    uint64_t b = ((const struct handle *)right)->fh;
    return (a > b) - (a < b);
}

/* All open files, unordered; returns how many. REQUIRES: the lock, and room for all. */
static size_t list_handles(const struct files *files, struct handle *handles)
{
    size_t count = 0;
    for (size_t i = 0; i < FILE_BUCKETS; i++) {
        for (const struct file *file = files->buckets[i]; file != NULL; file = file->next) {
            if (file->open_count == 0 || file->is_directory)
                continue;
            handles[count++] = (struct handle){
                .fh = file->fh,
                .nodeid = file->nodeid,
                .open_flags = file->open_flags,
                .lane = lane_code(file),
            };
        }
    }
    return count;
}

int64_t files_handles(struct files *files, uint64_t first, struct handle *handles, size_t room)
{
    size_t count = 0;
    pthread_rwlock_rdlock(&files->lock);
    struct handle *all = calloc(files->count + 1, sizeof *all);
    if (all != NULL)
        count = list_handles(files, all);
    pthread_rwlock_unlock(&files->lock);
    if (all == NULL)
        return -ENOMEM;
    qsort(all, count, sizeof *all, compare_handles);
    size_t left = first < count ? count - (size_t)first : 0;
    if (left > room)
        left = room;
    if (left > 0)
        memcpy(handles, all + first, left * sizeof *all);
    free(all);
    return (int64_t)left;
}

unsigned files_open_count(struct files *files)
{
    pthread_rwlock_rdlock(&files->lock);
    unsigned count = files->count;
    pthread_rwlock_unlock(&files->lock);
    return count;
}
