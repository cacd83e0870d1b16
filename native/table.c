/* Life of a table: create, attach, grow, destroy, and what needs no probing. */
#include "table.h"

#include "memory.h"
#include "table_layout.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int init_lock(struct kvfs_table *table)
{
    return -pthread_mutex_init(&table->lock, NULL);
}

/* Map the file and fill what does not depend on its content. */
static int map_table(struct kvfs_table *table, size_t nbytes, int protection)
{
    void *mapped = mmap(NULL, nbytes, protection, MAP_SHARED, table->fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    /* Probes are random: huge pages spare a TLB miss each. Refusal costs only speed. */
    (void)madvise(mapped, nbytes, MADV_HUGEPAGE);
    table->header = mapped;
    table->slots = (_Atomic uint64_t *)(void *)((char *)mapped + HEADER_BYTES);
    table->mapped_bytes = nbytes;
    table->owner = getpid();
    table->patience = kvfs_table_patience;
    atomic_store(&table->ranks, table->header->ranks);
    return 0;
}

static void unmap_table(struct kvfs_table *table)
{
    if (table->header != NULL)
        (void)munmap(table->header, table->mapped_bytes);
    table->header = NULL;
    if (table->fd >= 0)
        (void)close(table->fd);
    table->fd = -1;
}

int kvfs_table_create(struct kvfs_table *table, uint64_t capacity, uint64_t seed)
{
    if (capacity == 0 || capacity > KVFS_CAPACITY_MAX)
        return -EINVAL;
    uint64_t slots = SLOTS_MIN;
    while (slots / 2 < capacity)
        slots *= 2;
    memset(table, 0, sizeof *table);
    table->fd = kvfs_memfd("kvfs-index", table_bytes(slots), false);
    if (table->fd < 0)
        return table->fd;
    int status = map_table(table, table_bytes(slots), PROT_READ | PROT_WRITE);
    /* Readers get a descriptor that they can neither resize nor write through. */
    if (status == 0)
        status = kvfs_memfd_seal(table->fd, true);
    if (status == 0)
        status = init_lock(table);
    if (status != 0) {
        unmap_table(table);
        return status;
    }
    table->mask = slots - 1;
    table->capacity = slots / 2;
    table->seed = seed;
    table->is_writable = true;
    struct kvfs_table_header *header = table->header;
    header->magic = TABLE_MAGIC;
    header->version = TABLE_VERSION;
    header->record_bytes = KVFS_RECORD_BYTES;
    header->slots = slots;
    header->capacity = table->capacity;
    header->seed = seed;
    return 0;
}

/* Why the geometry of a header cannot be right; NULL if it can. */
static const char *header_fault(const struct kvfs_table_header *header, uint64_t nbytes)
{
    if (header->magic != TABLE_MAGIC)
        return "wrong magic";
    if (header->version != TABLE_VERSION)
        return "unknown version";
    if (header->record_bytes != KVFS_RECORD_BYTES)
        return "wrong record size";
    if (header->slots < SLOTS_MIN || header->slots > KVFS_CAPACITY_MAX * 2 ||
        (header->slots & (header->slots - 1)) != 0)
        return "wrong slot count";
    if (header->capacity != header->slots / 2)
        return "wrong capacity";
    if (table_bytes(header->slots) != nbytes)
        return "size does not match the slot count";
    return NULL;
}

static int check_file(int fd, uint64_t *nbytes, const char **reason)
{
    struct stat stat;
    if (fstat(fd, &stat) != 0)
        return -errno;
    /* A file that can shrink would turn a lookup into a SIGBUS. */
    int seals = fcntl(fd, F_GET_SEALS);
    *reason = "not sealed against shrinking";
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0)
        return -EBADMSG;
    *reason = "too short for a header";
    if (stat.st_size < HEADER_BYTES)
        return -EBADMSG;
    *nbytes = (uint64_t)stat.st_size;
    return 0;
}

int kvfs_table_attach(struct kvfs_table *table, int fd, const char **reason)
{
    memset(table, 0, sizeof *table);
    uint64_t nbytes = 0;
    table->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (table->fd < 0)
        return -errno;
    int status = check_file(table->fd, &nbytes, reason);
    if (status == 0)
        status = map_table(table, (size_t)nbytes, PROT_READ);
    if (status == 0) {
        /* Checked on a copy: what is used later is what was checked. */
        struct kvfs_table_header header;
        memcpy(&header, table->header, sizeof header);
        *reason = header_fault(&header, nbytes);
        if (*reason != NULL)
            status = -EBADMSG;
        table->mask = header.slots - 1;
        table->capacity = header.capacity;
        table->seed = header.seed;
    }
    if (status == 0)
        status = init_lock(table);
    if (status != 0)
        unmap_table(table);
    return status;
}

void kvfs_table_destroy(struct kvfs_table *table)
{
    unmap_table(table);
    pthread_mutex_destroy(&table->lock);
}

uint64_t kvfs_table_count(const struct kvfs_table *table)
{
    return atomic_load_explicit(&table->header->count, memory_order_relaxed);
}

bool kvfs_table_is_superseded(const struct kvfs_table *table)
{
    return atomic_load_explicit(&table->header->is_superseded, memory_order_acquire) != 0;
}

void kvfs_table_set_ranks(struct kvfs_table *table, const uint8_t *ranks, size_t count)
{
    uint8_t all[KVFS_RANKS];
    memset(all, 0xff, sizeof all);
    memcpy(all, ranks, count);
    bool is_shared = table->is_writable && table->owner == getpid();
    _Atomic uint64_t *words = is_shared ? table->header->ranks : table->own_ranks;
    for (int i = 0; i < KVFS_RANKS / 8; i++) {
        uint64_t word;
        memcpy(&word, all + i * 8, sizeof word);
        atomic_store_explicit(&words[i], word, memory_order_relaxed);
    }
    atomic_store(&table->ranks, words);
}

static bool copy_all(const struct kvfs_table *table, struct kvfs_table *fresh)
{
    uint64_t words[SLOT_WORDS];
    uint8_t record[KVFS_RECORD_BYTES];
    for (uint64_t i = 0; i <= table->mask; i++) {
        slot_peek(table_slot(table, i), words);
        if (!slot_is_live(words))
            continue;
        slot_to_record(record, words);
        if (kvfs_table_insert(fresh, record, 1, NULL) != 1)
            return false;
    }
    return true;
}

int kvfs_table_grow(struct kvfs_table *table, uint64_t capacity, struct kvfs_table *fresh)
{
    if (!table->is_writable || table->owner != getpid())
        return -EROFS;
    int status = 0;
    pthread_mutex_lock(&table->lock);
    if (kvfs_table_is_superseded(table))
        status = -ESTALE;
    else if (capacity < kvfs_table_count(table))
        status = -ENOSPC;
    else
        status = kvfs_table_create(fresh, capacity, table->seed);
    if (status == 0) {
        for (int i = 0; i < KVFS_RANKS / 8; i++)
            atomic_store(&fresh->header->ranks[i], atomic_load(&table->header->ranks[i]));
        if (copy_all(table, fresh)) {
            atomic_store_explicit(&table->header->is_superseded, 1, memory_order_release);
        } else {
            kvfs_table_destroy(fresh);
            status = -ENOSPC;
        }
    }
    pthread_mutex_unlock(&table->lock);
    return status;
}

int kvfs_table_retire(struct kvfs_table *table)
{
    if (!table->is_writable || table->owner != getpid())
        return -EROFS;
    pthread_mutex_lock(&table->lock);
    atomic_store_explicit(&table->header->is_superseded, 1, memory_order_release);
    pthread_mutex_unlock(&table->lock);
    return 0;
}
