/* Summaries and keys as Python functions: take the buffers, check every length, release the GIL,
 * call the C core. */
#include "batch_py.h"

#include "batch.h"
#include "closure.h"
#include "keyset.h"
#include "summary.h"
#include "tally.h"

#include <errno.h>

PyObject *py_sign_entries(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entries", "seed", NULL};
    PyObject *entries_object, *seed_object;
    struct kvfs_views views = {0};
    uint8_t *entries;
    uint64_t seed;
    size_t count;
    bool done = false;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &entries_object,
                                     &seed_object) ||
        !kvfs_parse_u64(seed_object, "seed", 0, UINT64_MAX, &seed))
        return NULL;
    entries = take_first(&views, entries_object, "entries", KVFS_ENTRY_BYTES, &count, true);
    if (entries != NULL) {
        Py_BEGIN_ALLOW_THREADS
        kvfs_sign_entries(entries, count, seed);
        Py_END_ALLOW_THREADS
        done = true;
    }
    kvfs_release(&views);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *py_place_payloads(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lengths", "payload_end", "entry_count", "limit", "offsets", NULL};
    PyObject *lengths_object, *end, *entry_count, *limit, *offsets_object;
    struct kvfs_views views = {0};
    struct kvfs_room room = {0};
    const void *lengths;
    void *offsets;
    size_t count;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO", names, &lengths_object, &end,
                                     &entry_count, &limit, &offsets_object) ||
        !kvfs_parse_u64(end, "payload_end", 0, INT64_MAX, &room.payload_end) ||
        !kvfs_parse_u64(entry_count, "entry_count", 0, UINT32_MAX, &room.entry_count) ||
        !kvfs_parse_u64(limit, "limit", 0, INT64_MAX, &room.limit))
        return NULL;
    if ((lengths = take_first(&views, lengths_object, "lengths", 8, &count, false)) != NULL &&
        (offsets = take(&views, offsets_object, "offsets", 8, count, true)) != NULL) {
        size_t placed;
        Py_BEGIN_ALLOW_THREADS
        placed = kvfs_place_payloads(&room, lengths, count, offsets);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("(nK)", (Py_ssize_t)placed, (unsigned long long)room.payload_end);
    }
    kvfs_release(&views);
    return result;
}

PyObject *py_fill_entries(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entries", "seed",   "keys",  "parents", "offsets",
                            "lengths", "tokens", "flags", "digests", NULL};
    PyObject *entries_object, *seed_object, *keys, *parents, *offsets, *lengths, *tokens, *flags,
        *digests;
    struct kvfs_views views = {0}, more = {0};
    struct kvfs_columns columns;
    uint8_t *entries;
    size_t count;
    uint64_t seed;
    bool done = false;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOOOO", names, &entries_object,
                                     &seed_object, &keys, &parents, &offsets, &lengths, &tokens,
                                     &flags, &digests) ||
        !kvfs_parse_u64(seed_object, "seed", 0, UINT64_MAX, &seed))
        return NULL;
    if ((entries = take_first(&views, entries_object, "entries", KVFS_ENTRY_BYTES, &count,
                              true)) != NULL &&
        (columns.keys = take(&views, keys, "keys", 32, count, false)) != NULL &&
        (columns.parents = take(&views, parents, "parents", 32, count, false)) != NULL &&
        (columns.offsets = take(&views, offsets, "offsets", 8, count, false)) != NULL &&
        (columns.lengths = take(&views, lengths, "lengths", 8, count, false)) != NULL &&
        (columns.tokens = take(&more, tokens, "tokens", 4, count, false)) != NULL &&
        (columns.flags = take(&more, flags, "flags", 1, count, false)) != NULL &&
        (columns.digests = take(&more, digests, "digests", 16, count, false)) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        kvfs_fill_entries(entries, &columns, count, seed);
        Py_END_ALLOW_THREADS
        done = true;
    }
    kvfs_release(&more);
    kvfs_release(&views);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static bool check_indices(const void *indices, size_t count, size_t entry_count)
{
    for (size_t i = 0; i < count; i++) {
        if (kvfs_get64(indices, i) < entry_count)
            continue;
        PyErr_Format(PyExc_ValueError, "indices: expected 0 to %zu, found %lld", entry_count - 1,
                     (long long)kvfs_get64(indices, i));
        return false;
    }
    return true;
}

static bool parse_place(PyObject *const objects[4], struct kvfs_record *place)
{
    uint64_t device, segment, generation, flags;
    if (!kvfs_parse_u64(objects[0], "device", 0, UINT16_MAX, &device) ||
        !kvfs_parse_u64(objects[1], "segment", 0, UINT32_MAX, &segment) ||
        !kvfs_parse_u64(objects[2], "generation", 0, UINT32_MAX, &generation) ||
        !kvfs_parse_u64(objects[3], "flags", 0, UINT16_MAX, &flags))
        return false;
    *place = (struct kvfs_record){.device = (uint16_t)device,
                                  .flags = (uint16_t)flags,
                                  .segment = (uint32_t)segment,
                                  .generation = (uint32_t)generation};
    return true;
}

PyObject *py_entry_records(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entries",    "indices", "device",  "segment",
                            "generation", "flags",   "records", NULL};
    PyObject *entries_object, *indices_object, *records_object, *numbers[4];
    struct kvfs_views views = {0};
    struct kvfs_record place;
    const uint8_t *entries;
    const void *indices;
    uint8_t *records;
    size_t entry_count, count;
    bool done = false;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOO", names, &entries_object,
                                     &indices_object, &numbers[0], &numbers[1], &numbers[2],
                                     &numbers[3], &records_object) ||
        !parse_place(numbers, &place))
        return NULL;
    if ((entries = take_first(&views, entries_object, "entries", KVFS_ENTRY_BYTES, &entry_count,
                              false)) != NULL &&
        (indices = take_first(&views, indices_object, "indices", 8, &count, false)) != NULL &&
        (records = take(&views, records_object, "records", KVFS_RECORD_BYTES, count, true)) !=
            NULL &&
        check_indices(indices, count, entry_count)) {
        Py_BEGIN_ALLOW_THREADS
        kvfs_entry_records(entries, indices, count, &place, records);
        Py_END_ALLOW_THREADS
        done = true;
    }
    kvfs_release(&views);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *py_pack_summary(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entries", NULL};
    PyObject *entries_object, *result = NULL;
    struct kvfs_views views = {0};
    const uint8_t *entries;
    size_t count;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &entries_object))
        return NULL;
    entries = take_first(&views, entries_object, "entries", KVFS_ENTRY_BYTES, &count, false);
    if (entries != NULL) {
        size_t nbytes = kvfs_summary_bytes(count);
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)nbytes);
        if (result != NULL) {
            uint8_t *summary = (uint8_t *)PyBytes_AsString(result);
            Py_BEGIN_ALLOW_THREADS
            kvfs_pack_summary(summary, entries, count);
            Py_END_ALLOW_THREADS
        }
    }
    kvfs_release(&views);
    return result;
}

static bool prepare_scan(struct kvfs_scan *scan, const Py_buffer *view)
{
    scan->summary = view->buf;
    scan->nbytes = (size_t)view->len;
    size_t entries = scan->nbytes / KVFS_ENTRY_BYTES;
    if (scan->entry_count < 0 || (uint64_t)scan->entry_count <= entries)
        return true;
    PyErr_Format(PyExc_ValueError, "entry_count: %lld entries do not fit into %zu bytes",
                 (long long)scan->entry_count, scan->nbytes);
    return false;
}

static PyObject *scan_result(const struct kvfs_scan *scan)
{
    return Py_BuildValue("(y#y#K)", scan->found == 0 ? "" : (const char *)scan->entries,
                         (Py_ssize_t)(scan->found * KVFS_ENTRY_BYTES),
                         scan->found == 0 ? "" : (const char *)scan->indices,
                         (Py_ssize_t)(scan->found * sizeof(uint32_t)),
                         (unsigned long long)scan->end_index);
}

PyObject *py_scan_entries(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"summary", "seed", "entry_count", "payload_limit", NULL};
    PyObject *summary, *seed, *limit;
    long long entry_count;
    struct kvfs_views views = {0};
    struct kvfs_scan scan = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOLO", names, &summary, &seed, &entry_count,
                                     &limit) ||
        !kvfs_parse_u64(seed, "seed", 0, UINT64_MAX, &scan.seed) ||
        !kvfs_parse_u64(limit, "payload_limit", 0, UINT64_MAX, &scan.payload_limit))
        return NULL;
    scan.entry_count = entry_count;
    Py_buffer *view = kvfs_take(&views, summary, false);
    if (view != NULL && prepare_scan(&scan, view) && kvfs_need_guard()) {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = kvfs_scan_entries(&scan);
        Py_END_ALLOW_THREADS
        result = status == 0 ? scan_result(&scan) : PyErr_NoMemory();
        kvfs_scan_free(&scan);
    }
    kvfs_release(&views);
    return result;
}

PyObject *py_distinct_keys(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "firsts", NULL};
    PyObject *keys_object, *firsts_object, *result = NULL;
    struct kvfs_views views = {0};
    const uint8_t *keys;
    int64_t *firsts;
    size_t count;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &keys_object, &firsts_object))
        return NULL;
    if ((keys = take_first(&views, keys_object, "keys", 32, &count, false)) != NULL &&
        (firsts = take(&views, firsts_object, "firsts", 8, count, true)) != NULL) {
        int64_t distinct = -ENOMEM;
        if (count < UINT32_MAX) {
            Py_BEGIN_ALLOW_THREADS
            distinct = kvfs_distinct_keys(keys, count, firsts);
            Py_END_ALLOW_THREADS
        }
        result = distinct < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(distinct);
    }
    kvfs_release(&views);
    return result;
}

PyObject *py_find_keys(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "among", "positions", NULL};
    PyObject *keys_object, *among_object, *positions_object;
    struct kvfs_views views = {0};
    const uint8_t *keys, *among;
    int64_t *positions;
    size_t count, among_count;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &keys_object, &among_object,
                                     &positions_object))
        return NULL;
    if ((keys = take_first(&views, keys_object, "keys", 32, &count, false)) != NULL &&
        (among = take_first(&views, among_object, "among", 32, &among_count, false)) != NULL &&
        (positions = take(&views, positions_object, "positions", 8, count, true)) != NULL) {
        int64_t found = -ENOMEM;
        if (among_count < UINT32_MAX) {
            Py_BEGIN_ALLOW_THREADS
            found = kvfs_find_keys(keys, count, among, among_count, positions);
            Py_END_ALLOW_THREADS
        }
        result = found < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(found);
    }
    kvfs_release(&views);
    return result;
}

PyObject *py_closure(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "parents", "dropped", NULL};
    PyObject *keys_object, *parents_object, *dropped_object;
    struct kvfs_views views = {0};
    const uint8_t *keys, *parents;
    uint8_t *dropped;
    size_t count;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &keys_object, &parents_object,
                                     &dropped_object))
        return NULL;
    if ((keys = take_first(&views, keys_object, "keys", 32, &count, false)) != NULL &&
        (parents = take(&views, parents_object, "parents", 32, count, false)) != NULL &&
        (dropped = take(&views, dropped_object, "dropped", 1, count, true)) != NULL) {
        int64_t total = -ENOMEM;
        if (count < UINT32_MAX) {
            Py_BEGIN_ALLOW_THREADS
            total = kvfs_closure(keys, parents, dropped, count);
            Py_END_ALLOW_THREADS
        }
        result = total < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(total);
    }
    kvfs_release(&views);
    return result;
}

/* Keeps the GIL: it is short, and nobody else changes the counts meanwhile. */
PyObject *py_tally(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"records", "lengths", "statuses", "counts", NULL};
    PyObject *records_object, *lengths_object, *statuses_object, *counts_object;
    struct kvfs_views views = {0};
    const void *records, *lengths = NULL, *statuses = NULL;
    void *counts;
    size_t count, devices;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO", names, &records_object, &lengths_object,
                                     &statuses_object, &counts_object))
        return NULL;
    if ((records = take_first(&views, records_object, "records", 64, &count, false)) != NULL &&
        (lengths_object == Py_None ||
         (lengths = take(&views, lengths_object, "lengths", 8, count, false)) != NULL) &&
        (statuses_object == Py_None ||
         (statuses = take(&views, statuses_object, "statuses", 4, count, false)) != NULL) &&
        (counts = take_first(&views, counts_object, "counts", 16, &devices, true)) != NULL) {
        int64_t counted = -1;
        if (devices <= KVFS_TALLY_DEVICES_MAX)
            counted = kvfs_tally(records, count, lengths, statuses, counts, devices);
        result = counted >= 0 ? PyLong_FromLongLong(counted)
                              : PyErr_Format(PyExc_ValueError, "counts has no room for a device");
    }
    kvfs_release(&views);
    return result;
}
