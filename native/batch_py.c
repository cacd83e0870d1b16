/* Copying, file I/O and summaries as Python functions: take the buffers, check every length,
 * release the GIL, call the C core. */
#include "pyutil.h"

#include "closure.h"
#include "copy.h"
#include "fileio.h"
#include "hash.h"
#include "summary.h"

#include <errno.h>

#define PAD_MAX ((uint64_t)1 << 40)

/* Take an argument of exactly count items of item_bytes. */
static void *take(struct kvfs_views *views, PyObject *object, const char *name, size_t item_bytes,
                  size_t count, bool is_writable)
{
    Py_buffer *view = kvfs_take(views, object, is_writable);
    if (view == NULL || !kvfs_check_items(view, name, item_bytes, count))
        return NULL;
    return view->buf;
}

/* Take the lengths, which say how many items the batch has. */
static const void *take_lengths(struct kvfs_views *views, PyObject *object, size_t *count)
{
    Py_buffer *view = kvfs_take(views, object, false);
    if (view == NULL || !kvfs_count_items(view, "lengths", sizeof(uint64_t), count))
        return NULL;
    return view->buf;
}

static bool parse_pad(PyObject *object, uint64_t *pad_to)
{
    *pad_to = 1;
    return object == NULL || kvfs_parse_u64(object, "pad_to", 1, PAD_MAX, pad_to);
}

static PyObject *py_copy_hash(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"targets", "sources", "lengths", "digests", "statuses", "pad_to", NULL};
    PyObject *targets, *sources, *lengths, *digests, *statuses, *pad = NULL;
    struct kvfs_views views = {0};
    struct kvfs_copy_batch batch = {0};
    uint64_t pad_to;
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO|O", names, &targets, &sources, &lengths,
                                     &digests, &statuses, &pad) ||
        !parse_pad(pad, &pad_to))
        return NULL;
    if ((batch.lengths = take_lengths(&views, lengths, &batch.count)) != NULL &&
        (batch.targets = take(&views, targets, "targets", 8, batch.count, false)) != NULL &&
        (batch.sources = take(&views, sources, "sources", 8, batch.count, false)) != NULL &&
        (batch.digests = take(&views, digests, "digests", 16, batch.count, true)) != NULL &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard()) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_copy_hash(&batch, pad_to);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *py_copy_verify(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"targets", "sources", "lengths", "digests", "statuses", NULL};
    PyObject *targets, *sources, *lengths, *digests, *statuses;
    struct kvfs_views views = {0};
    struct kvfs_copy_batch batch = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO", names, &targets, &sources, &lengths,
                                     &digests, &statuses))
        return NULL;
    if ((batch.lengths = take_lengths(&views, lengths, &batch.count)) != NULL &&
        (batch.targets = take(&views, targets, "targets", 8, batch.count, false)) != NULL &&
        (batch.sources = take(&views, sources, "sources", 8, batch.count, false)) != NULL &&
        (Py_IsNone(digests) ||
         (batch.digests = take(&views, digests, "digests", 16, batch.count, false)) != NULL) &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard()) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_copy_verify(&batch);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *py_verify(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sources", "lengths", "digests", "statuses", NULL};
    PyObject *sources, *lengths, *digests, *statuses;
    struct kvfs_views views = {0};
    struct kvfs_copy_batch batch = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO", names, &sources, &lengths, &digests,
                                     &statuses))
        return NULL;
    if ((batch.lengths = take_lengths(&views, lengths, &batch.count)) != NULL &&
        (batch.sources = take(&views, sources, "sources", 8, batch.count, false)) != NULL &&
        (batch.digests = take(&views, digests, "digests", 16, batch.count, false)) != NULL &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard()) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_verify(&batch);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *py_pwrite_hash(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd",      "offsets",  "sources", "lengths",
                            "digests", "statuses", "pad_to",  NULL};
    PyObject *offsets, *sources, *lengths, *digests, *statuses, *pad = NULL;
    struct kvfs_views views = {0};
    struct kvfs_write_batch batch = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOOOO|O", names, &batch.fd, &offsets, &sources,
                                     &lengths, &digests, &statuses, &pad) ||
        !parse_pad(pad, &batch.pad_to))
        return NULL;
    if ((batch.lengths = take_lengths(&views, lengths, &batch.count)) != NULL &&
        (batch.offsets = take(&views, offsets, "offsets", 8, batch.count, false)) != NULL &&
        (batch.sources = take(&views, sources, "sources", 8, batch.count, false)) != NULL &&
        (batch.digests = take(&views, digests, "digests", 16, batch.count, true)) != NULL &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard()) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_pwrite_hash(&batch);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *py_pread_verify(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fds", "offsets", "lengths", "targets", "digests", "statuses", NULL};
    PyObject *fds, *offsets, *lengths, *targets, *digests, *statuses;
    struct kvfs_views views = {0};
    struct kvfs_read_batch batch = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO", names, &fds, &offsets, &lengths,
                                     &targets, &digests, &statuses))
        return NULL;
    if ((batch.lengths = take_lengths(&views, lengths, &batch.count)) != NULL &&
        (batch.fds = take(&views, fds, "fds", 4, batch.count, false)) != NULL &&
        (batch.offsets = take(&views, offsets, "offsets", 8, batch.count, false)) != NULL &&
        (batch.targets = take(&views, targets, "targets", 8, batch.count, false)) != NULL &&
        (Py_IsNone(digests) ||
         (batch.digests = take(&views, digests, "digests", 16, batch.count, false)) != NULL) &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard()) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_pread_verify(&batch);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *py_sign_entries(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"entries", "seed", NULL};
    PyObject *entries, *seed_object;
    struct kvfs_views views = {0};
    uint64_t seed;
    size_t count;
    bool done = false;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &entries, &seed_object) ||
        !kvfs_parse_u64(seed_object, "seed", 0, UINT64_MAX, &seed))
        return NULL;
    Py_buffer *view = kvfs_take(&views, entries, true);
    if (view != NULL && kvfs_count_items(view, "entries", KVFS_ENTRY_BYTES, &count)) {
        Py_BEGIN_ALLOW_THREADS
        kvfs_sign_entries(view->buf, count, seed);
        Py_END_ALLOW_THREADS
        done = true;
    }
    kvfs_release(&views);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
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

static PyObject *py_scan_entries(PyObject *module, PyObject *args, PyObject *kwargs)
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

static PyObject *py_closure(PyObject *module, PyObject *args, PyObject *kwargs)
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
    Py_buffer *view = kvfs_take(&views, keys_object, false);
    if (view != NULL && kvfs_count_items(view, "keys", 32, &count) &&
        (parents = take(&views, parents_object, "parents", 32, count, false)) != NULL &&
        (dropped = take(&views, dropped_object, "dropped", 1, count, true)) != NULL) {
        keys = view->buf;
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

#define METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))py_##name, METH_VARARGS | METH_KEYWORDS, NULL}

PyMethodDef kvfs_batch_methods[] = {
    METHOD(copy_hash),    METHOD(copy_verify),  METHOD(verify),  METHOD(pwrite_hash),
    METHOD(pread_verify), METHOD(sign_entries), METHOD(closure), METHOD(scan_entries),
    {NULL, NULL, 0, NULL},
};
