/* Hammer a table: one writer, several readers, for a fixed amount of work.
 *
 * Every record carries in each of its fields a function of (key number, version). Readers check
 * that all fields of what they get belong to one version, and that the resident keys, which the
 * writer rewrites but never removes, are always found. Run under -fsanitize=thread. */
#include "table.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEYS = 512, RESIDENT = 128, DEVICES = 3, READERS = 3, BATCH = 32 };

static struct kvfs_table writer;
static atomic_int is_done;
static atomic_long torn, lost, reads;

static uint64_t mix(uint64_t value)
{
    value ^= value >> 31;
    value *= UINT64_C(0x9e3779b97f4a7c15);
    return value ^ value >> 29;
}

static void make_key(uint8_t *key, uint64_t number)
{
    for (uint64_t i = 0; i < 4; i++) {
        uint64_t word = mix(number * 4 + i + 1);
        memcpy(key + i * 8, &word, 8);
    }
}

static struct kvfs_record make_record(uint64_t number, uint16_t device, uint32_t version)
{
    struct kvfs_record record = {.device = device,
                                 .segment = version,
                                 .generation = version * 3,
                                 .page = version * 5,
                                 .length = version | 1,
                                 .tokens = version * 7,
                                 .entry = version * 11};
    make_key(record.key, number);
    return record;
}

static bool is_torn(const struct kvfs_record *record, const uint8_t *key)
{
    uint32_t version = record->segment;
    return memcmp(record->key, key, KVFS_KEY_BYTES) != 0 || record->generation != version * 3 ||
           record->page != version * 5 || record->length != (version | 1) ||
           record->tokens != version * 7 || record->entry != version * 11 ||
           record->device >= DEVICES;
}

static void check_batch(const struct kvfs_table *table, uint64_t *state)
{
    uint8_t keys[BATCH * KVFS_KEY_BYTES];
    uint64_t numbers[BATCH];
    struct kvfs_record records[BATCH];
    for (int i = 0; i < BATCH; i++) {
        *state = mix(*state + 1);
        numbers[i] = *state % KEYS;
        make_key(keys + i * KVFS_KEY_BYTES, numbers[i]);
    }
    int device = *state % 2 == 0 ? KVFS_ANY_DEVICE : 1;
    kvfs_table_lookup(table, keys, BATCH, device, (uint8_t *)records);
    for (int i = 0; i < BATCH; i++) {
        bool is_found = records[i].length != 0;
        if (is_found && is_torn(&records[i], keys + i * KVFS_KEY_BYTES))
            atomic_fetch_add(&torn, 1);
        /* Resident keys have a copy on device 1 that is never removed. */
        if (!is_found && numbers[i] < RESIDENT)
            atomic_fetch_add(&lost, 1);
    }
    atomic_fetch_add(&reads, BATCH);
}

static void *read_all(void *argument)
{
    struct kvfs_table table;
    const char *reason = NULL;
    uint64_t state = (uintptr_t)argument;
    if (kvfs_table_attach(&table, writer.fd, &reason) != 0) {
        fprintf(stderr, "attach failed: %s\n", reason);
        exit(2);
    }
    /* A machine under load may stop the writer for longer than a reader should wait in earnest;
     * here a miss must mean that the table lost a record. */
    table.patience = 1 << 20;
    while (!atomic_load(&is_done))
        check_batch(&table, &state);
    kvfs_table_destroy(&table);
    return NULL;
}

static void change_one(uint64_t *state, uint32_t version)
{
    *state = mix(*state + 1);
    uint64_t number = *state % KEYS;
    uint16_t device = (uint16_t)(*state >> 32) % DEVICES;
    struct kvfs_record record = make_record(number, device, version);
    bool is_resident = number < RESIDENT && device == 1;
    struct kvfs_record present;
    if (is_resident || *state >> 48 & 1) {
        kvfs_table_insert(&writer, (const uint8_t *)&record, 1, NULL);
    } else if (kvfs_table_lookup(&writer, record.key, 1, device, (uint8_t *)&present) == 1) {
        kvfs_table_remove(&writer, (const uint8_t *)&present, 1);
    }
}

int main(int argc, char **argv)
{
    long changes = argc > 1 ? atol(argv[1]) : 200000;
    pthread_t threads[READERS];
    if (kvfs_table_create(&writer, (uint64_t)KEYS * DEVICES, 7) != 0)
        return 2;
    for (uint64_t number = 0; number < RESIDENT; number++) {
        struct kvfs_record record = make_record(number, 1, 1);
        if (kvfs_table_insert(&writer, (const uint8_t *)&record, 1, NULL) != 1)
            return 2;
    }
    for (uintptr_t i = 0; i < READERS; i++)
        if (pthread_create(&threads[i], NULL, read_all, (void *)(i + 1)) != 0)
            return 2;
    uint64_t state = 42;
    for (long i = 0; i < changes; i++)
        change_one(&state, (uint32_t)i + 2);
    atomic_store(&is_done, 1);
    for (int i = 0; i < READERS; i++)
        pthread_join(threads[i], NULL);
    printf("%ld changes, %ld reads, %ld torn, %ld lost\n", changes, atomic_load(&reads),
           atomic_load(&torn), atomic_load(&lost));
    kvfs_table_destroy(&writer);
    return atomic_load(&torn) == 0 && atomic_load(&lost) == 0 ? 0 : 1;
}
