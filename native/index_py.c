/* kvfs._native.Index: the table as a Python type. */
#include "pyutil.h"

#include "table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    struct kvfs_life life;
    struct kvfs_table table;
} Index;

static void index_release(Index *self, bool is_last)
{
    if (is_last)
        kvfs_table_destroy(&self->table);
}

static PyObject *raise_write(int status)
{
    if (status == -EROFS)
        PyErr_SetString(PyExc_ValueError, "index is read-only here: another process writes it");
    else if (status == -ESTALE)
        PyErr_SetString(PyExc_ValueError, "index is superseded by a larger one");
    else
        return kvfs_raise(status);
    return NULL;
}

static bool parse_capacity(PyObject *object, uint64_t *capacity)
{
    return kvfs_parse_u64(object, "capacity", 1, KVFS_CAPACITY_MAX, capacity);
}

static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"capacity", "seed", NULL};
    PyObject *capacity_object, *seed_object = NULL;
    uint64_t capacity, seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", names, &capacity_object,
                                     &seed_object) ||
        !parse_capacity(capacity_object, &capacity) ||
        (seed_object != NULL && !kvfs_parse_u64(seed_object, "seed", 0, UINT64_MAX, &seed)))
        return NULL;
    Index *self = (Index *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    int status = kvfs_table_create(&self->table, capacity, seed);
    return kvfs_opened((PyObject *)self, &self->life, status, NULL, NULL);
}

static PyObject *index_attach(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", NULL};
    const char *reason = NULL;
    int fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i", names, &fd))
        return NULL;
    Index *self = (Index *)kvfs_alloc((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    int status = kvfs_table_attach(&self->table, fd, &reason);
    return kvfs_opened((PyObject *)self, &self->life, status, "an index", reason);
}

static void index_dealloc(PyObject *object)
{
    Index *self = (Index *)object;
    index_release(self, kvfs_shut(&self->life));
    kvfs_free(object);
}

static PyObject *index_close(PyObject *object, PyObject *args)
{
    Index *self = (Index *)object;
    (void)args;
    index_release(self, kvfs_shut(&self->life));
    Py_RETURN_NONE;
}

static PyObject *index_get(PyObject *object, void *closure)
{
    Index *self = (Index *)object;
    const char *what = closure;
    if (!kvfs_enter(&self->life, "index"))
        return NULL;
    PyObject *result;
    if (what[0] == 'f')
        result = PyLong_FromLong(self->table.fd);
    else if (what[1] == 'a')
        result = PyLong_FromUnsignedLongLong(self->table.capacity);
    else if (what[1] == 'o')
        result = PyLong_FromUnsignedLongLong(kvfs_table_count(&self->table));
    else if (what[3] == 's')
        result = PyBool_FromLong(kvfs_table_is_superseded(&self->table));
    else
        result = PyBool_FromLong(self->table.is_writable);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *index_set_ranks(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ranks", NULL};
    Index *self = (Index *)object;
    PyObject *ranks;
    struct kvfs_views views = {0};
    bool done = false;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &ranks) ||
        !kvfs_enter(&self->life, "index"))
        return NULL;
    Py_buffer *view = kvfs_take(&views, ranks, false);
    if (view != NULL && view->len > KVFS_RANKS) {
        PyErr_Format(PyExc_ValueError, "ranks: expected at most %d, found %zd", KVFS_RANKS,
                     view->len);
    } else if (view != NULL) {
        kvfs_table_set_ranks(&self->table, view->buf, (size_t)view->len);
        done = true;
    }
    kvfs_release(&views);
    index_release(self, kvfs_leave(&self->life));
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

/* Lookup on one device or any. REQUIRES: entered. */
static PyObject *look_up(Index *self, PyObject *keys_object, PyObject *out_object, int device)
{
    struct kvfs_views views = {0};
    PyObject *result = NULL;
    size_t count;
    Py_buffer *keys = kvfs_take(&views, keys_object, false);
    Py_buffer *out = NULL;
    if (keys != NULL && kvfs_count_items(keys, "keys", KVFS_KEY_BYTES, &count) &&
        (out = kvfs_take(&views, out_object, true)) != NULL &&
        kvfs_check_items(out, "out", KVFS_RECORD_BYTES, count)) {
        size_t hits;
        Py_BEGIN_ALLOW_THREADS
        hits = kvfs_table_lookup(&self->table, keys->buf, count, device, out->buf);
        Py_END_ALLOW_THREADS
        result = PyLong_FromSize_t(hits);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *index_lookup(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "out", NULL};
    Index *self = (Index *)object;
    PyObject *keys, *out;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &keys, &out) ||
        !kvfs_enter(&self->life, "index"))
        return NULL;
    PyObject *result = look_up(self, keys, out, KVFS_ANY_DEVICE);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *index_lookup_device(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "device", "out", NULL};
    Index *self = (Index *)object;
    PyObject *keys, *device_object, *out;
    uint64_t device;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &keys, &device_object, &out) ||
        !kvfs_parse_u64(device_object, "device", 0, UINT16_MAX, &device) ||
        !kvfs_enter(&self->life, "index"))
        return NULL;
    PyObject *result = look_up(self, keys, out, (int)device);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *index_match_prefix(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "sums", NULL};
    Index *self = (Index *)object;
    PyObject *keys_object, *sums_object = Py_None, *result = NULL;
    struct kvfs_views views = {0};
    size_t count;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", names, &keys_object, &sums_object) ||
        !kvfs_enter(&self->life, "index"))
        return NULL;
    Py_buffer *keys = kvfs_take(&views, keys_object, false);
    bool is_sound = keys != NULL && kvfs_count_items(keys, "keys", KVFS_KEY_BYTES, &count);
    Py_buffer *sums = NULL;
    if (is_sound && !Py_IsNone(sums_object)) {
        sums = kvfs_take(&views, sums_object, true);
        is_sound = sums != NULL && kvfs_check_items(sums, "sums", sizeof(uint64_t), 2);
    }
    if (is_sound) {
        size_t matched;
        Py_BEGIN_ALLOW_THREADS
        matched = kvfs_table_match_prefix(&self->table, keys->buf, count);
        Py_END_ALLOW_THREADS
        if (sums != NULL) {
            uint64_t *counts = sums->buf;
            counts[0] += count;
            counts[1] += matched;
        }
        result = PyLong_FromSize_t(matched);
    }
    kvfs_release(&views);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

/* A record of length 0 would read as a miss: it means that the caller passed lookup's misses. */
static bool check_lengths(const Py_buffer *records, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct kvfs_record record;
        memcpy(&record, (const char *)records->buf + i * sizeof record, sizeof record);
        if (record.length == 0) {
            PyErr_Format(PyExc_ValueError, "records: record %zu has length 0", i);
            return false;
        }
    }
    return true;
}

/* Insert. REQUIRES: entered. */
static PyObject *insert(Index *self, PyObject *records_object, PyObject *replaced_object)
{
    struct kvfs_views views = {0};
    PyObject *result = NULL;
    size_t count = 0;
    uint8_t *replaced = NULL;
    Py_buffer *records = kvfs_take(&views, records_object, false);
    bool is_sound = records != NULL &&
                    kvfs_count_items(records, "records", KVFS_RECORD_BYTES, &count) &&
                    check_lengths(records, count);
    if (is_sound && !Py_IsNone(replaced_object)) {
        Py_buffer *view = kvfs_take(&views, replaced_object, true);
        is_sound = view != NULL && kvfs_check_items(view, "replaced", KVFS_RECORD_BYTES, count);
        replaced = is_sound ? view->buf : NULL;
    }
    if (is_sound) {
        int64_t done;
        Py_BEGIN_ALLOW_THREADS
        done = kvfs_table_insert(&self->table, records->buf, count, replaced);
        Py_END_ALLOW_THREADS
        result = done < 0 ? raise_write((int)done) : PyLong_FromLongLong(done);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *index_insert(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"records", "replaced", NULL};
    Index *self = (Index *)object;
    PyObject *records, *replaced = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", names, &records, &replaced) ||
        !kvfs_enter(&self->life, "index"))
        return NULL;
    PyObject *result = insert(self, records, replaced);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

/* Remove (flags < 0) or set flags. */
static PyObject *change(Index *self, PyObject *records_object, int flags)
{
    struct kvfs_views views = {0};
    PyObject *result = NULL;
    size_t count;
    if (!kvfs_enter(&self->life, "index"))
        return NULL;
    Py_buffer *records = kvfs_take(&views, records_object, false);
    if (records != NULL && kvfs_count_items(records, "records", KVFS_RECORD_BYTES, &count)) {
        int64_t done;
        Py_BEGIN_ALLOW_THREADS
        if (flags < 0)
            done = kvfs_table_remove(&self->table, records->buf, count);
        else
            done = kvfs_table_set_flags(&self->table, records->buf, count, (uint16_t)flags);
        Py_END_ALLOW_THREADS
        result = done < 0 ? raise_write((int)done) : PyLong_FromLongLong(done);
    }
    kvfs_release(&views);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *index_remove(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"records", NULL};
    PyObject *records;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &records))
        return NULL;
    return change((Index *)object, records, -1);
}

static PyObject *index_set_flags(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"records", "flags", NULL};
    PyObject *records, *flags_object;
    uint64_t flags;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &records, &flags_object) ||
        !kvfs_parse_u64(flags_object, "flags", 0, UINT16_MAX, &flags))
        return NULL;
    return change((Index *)object, records, (int)flags);
}

/* Collect all records into malloc'ed memory; the table may grow meanwhile. GIL not needed. */
static uint8_t *collect(Index *self, size_t *found)
{
    size_t room = 64;
    uint8_t *records = NULL;
    for (;;) {
        uint8_t *larger = realloc(records, room * KVFS_RECORD_BYTES);
        if (larger == NULL) {
            free(records);
            return NULL;
        }
        records = larger;
        *found = kvfs_table_snapshot(&self->table, records, room);
        if (*found <= room)
            return records;
        room = *found + *found / 8;
    }
}

static PyObject *index_snapshot(PyObject *object, PyObject *args)
{
    Index *self = (Index *)object;
    uint8_t *records;
    size_t found = 0;
    (void)args;
    if (!kvfs_enter(&self->life, "index"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    records = collect(self, &found);
    Py_END_ALLOW_THREADS
    PyObject *result = NULL;
    if (records == NULL)
        PyErr_NoMemory();
    else
        result = PyBytes_FromStringAndSize((const char *)records,
                                           (Py_ssize_t)(found * KVFS_RECORD_BYTES));
    free(records);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

/* Grow. REQUIRES: entered. */
static PyObject *grow(Index *self, uint64_t capacity)
{
    Index *fresh = (Index *)kvfs_alloc(Py_TYPE((PyObject *)self));
    if (fresh == NULL)
        return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = kvfs_table_grow(&self->table, capacity, &fresh->table);
    Py_END_ALLOW_THREADS
    fresh->life.is_open = status == 0;
    if (status == 0)
        return (PyObject *)fresh;
    Py_DECREF(fresh);
    if (status != -ENOSPC)
        return raise_write(status);
    return PyErr_Format(PyExc_ValueError, "capacity: %llu is less than the records there are",
                        (unsigned long long)capacity);
}

static PyObject *index_grow(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"capacity", NULL};
    Index *self = (Index *)object;
    PyObject *capacity_object;
    uint64_t capacity;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &capacity_object) ||
        !parse_capacity(capacity_object, &capacity) || !kvfs_enter(&self->life, "index"))
        return NULL;
    PyObject *result = grow(self, capacity);
    index_release(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *index_retire(PyObject *object, PyObject *args)
{
    Index *self = (Index *)object;
    (void)args;
    if (!kvfs_enter(&self->life, "index"))
        return NULL;
    int status = kvfs_table_retire(&self->table);
    index_release(self, kvfs_leave(&self->life));
    if (status != 0)
        return raise_write(status);
    Py_RETURN_NONE;
}

#define METHOD(name, more) \
    {#name, (PyCFunction)(void (*)(void))index_##name, METH_VARARGS | METH_KEYWORDS | (more), NULL}

static PyMethodDef methods[] = {
    METHOD(attach, METH_CLASS),
    METHOD(set_ranks, 0),
    METHOD(insert, 0),
    METHOD(lookup, 0),
    METHOD(lookup_device, 0),
    METHOD(match_prefix, 0),
    METHOD(remove, 0),
    METHOD(set_flags, 0),
    {"snapshot", index_snapshot, METH_NOARGS, NULL},
    METHOD(grow, 0),
    {"retire", index_retire, METH_NOARGS, NULL},
    {"close", index_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define GETTER(name) \
    {name, index_get, NULL, NULL, (void *)(uintptr_t)name}

static PyGetSetDef getters[] = {
    GETTER("fd"),           GETTER("capacity"), GETTER("count"), GETTER("is_superseded"),
    GETTER("is_writable"), {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)index_new},
    {Py_tp_dealloc, (void *)index_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvfs._native.Index",
    .basicsize = sizeof(Index),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

bool kvfs_add_index(PyObject *module)
{
    return kvfs_add_type(module, &spec);
}
