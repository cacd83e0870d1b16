/* Copying and file I/O as Python functions: take the buffers, check every length, release the
 * GIL, call the C core. */
#include "batch_py.h"

#include "copy.h"
#include "fileio.h"
#include "memory.h"

#define PAD_MAX ((uint64_t)1 << 40)

/* Take the lengths, which say how many items the batch has. */
static const void *take_lengths(struct kvfs_views *views, PyObject *object, size_t *count)
{
    return take_first(views, object, "lengths", sizeof(uint64_t), count, false);
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

static PyObject *py_absent(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"addresses", "lengths", "statuses", NULL};
    PyObject *addresses_object, *lengths_object, *statuses_object, *result = NULL;
    struct kvfs_views views = {0};
    const void *addresses, *lengths;
    void *statuses;
    size_t count;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &addresses_object,
                                     &lengths_object, &statuses_object))
        return NULL;
    if ((lengths = take_lengths(&views, lengths_object, &count)) != NULL &&
        (addresses = take(&views, addresses_object, "addresses", 8, count, false)) != NULL &&
        (statuses = take(&views, statuses_object, "statuses", 4, count, true)) != NULL) {
        size_t found;
        Py_BEGIN_ALLOW_THREADS
        found = kvfs_absent(addresses, lengths, count, statuses);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(found);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *py_pwrite_hash(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd",      "offsets",  "sources", "lengths",
                            "digests", "statuses", "pad_to",  "flags", NULL};
    PyObject *offsets, *sources, *lengths, *digests, *statuses, *pad = NULL;
    struct kvfs_views views = {0};
    struct kvfs_write_batch batch = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOOOO|Oi", names, &batch.fd, &offsets,
                                     &sources, &lengths, &digests, &statuses, &pad,
                                     &batch.flags) ||
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
    static char *names[] = {"fds", "offsets", "lengths", "targets", "digests", "statuses", "flags",
                            NULL};
    PyObject *fds, *offsets, *lengths, *targets, *digests, *statuses;
    struct kvfs_views views = {0};
    struct kvfs_read_batch batch = {0};
    PyObject *result = NULL;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO|i", names, &fds, &offsets,
                                     &lengths, &targets, &digests, &statuses, &batch.flags))
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

#define METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))py_##name, METH_VARARGS | METH_KEYWORDS, NULL}

PyMethodDef kvfs_batch_methods[] = {
    METHOD(copy_hash),     METHOD(copy_verify),  METHOD(verify),         METHOD(pwrite_hash),
    METHOD(pread_verify),  METHOD(sign_entries), METHOD(place_payloads), METHOD(fill_entries),
    METHOD(entry_records), METHOD(pack_summary), METHOD(scan_entries),   METHOD(distinct_keys),
    METHOD(find_keys),     METHOD(closure),      METHOD(tally),          METHOD(absent),
    {NULL, NULL, 0, NULL},
};
