/* kvfs._native.LeasePage: a lease page as a Python type. */
#include "pyutil.h"

#include "lease_page.h"
#include "table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    struct kvfs_life life;
    struct kvfs_lease_page page;
} LeasePage;

static void page_leave(LeasePage *self, bool is_last)
{
    if (!is_last)
        return;
    Py_BEGIN_ALLOW_THREADS /* the heart is waited for */
    kvfs_lease_page_destroy(&self->page);
    Py_END_ALLOW_THREADS
}

static PyObject *page_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slots", NULL};
    PyObject *slots_object;
    uint64_t slots;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &slots_object) ||
        !kvfs_parse_u64(slots_object, "slots", 1, KVFS_LEASE_SLOTS_MAX, &slots))
        return NULL;
    LeasePage *self = (LeasePage *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    int status = kvfs_lease_page_create(&self->page, slots);
    return kvfs_opened((PyObject *)self, &self->life, status, NULL, NULL);
}

static PyObject *page_attach(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "notice_fd", NULL};
    const char *reason = NULL;
    int fd, notice_fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii", names, &fd, &notice_fd))
        return NULL;
    LeasePage *self = (LeasePage *)kvfs_alloc((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    int status = kvfs_lease_page_attach(&self->page, fd, notice_fd, &reason);
    return kvfs_opened((PyObject *)self, &self->life, status, "a lease page", reason);
}

static void page_dealloc(PyObject *object)
{
    LeasePage *self = (LeasePage *)object;
    page_leave(self, kvfs_shut(&self->life));
    kvfs_free(object);
}

static PyObject *page_close(PyObject *object, PyObject *args)
{
    LeasePage *self = (LeasePage *)object;
    (void)args;
    page_leave(self, kvfs_shut(&self->life));
    Py_RETURN_NONE;
}

static PyObject *page_get(PyObject *object, void *closure)
{
    LeasePage *self = (LeasePage *)object;
    const char *what = closure;
    if (!kvfs_enter(&self->life, "lease page"))
        return NULL;
    PyObject *result;
    if (what[0] == 'f')
        result = PyLong_FromLong(self->page.fd);
    else if (what[0] == 'n')
        result = PyLong_FromLong(self->page.notice_fd);
    else if (what[0] == 's')
        result = PyLong_FromUnsignedLongLong(kvfs_lease_page_freed(&self->page));
    else if (what[0] == 'h')
        result = PyLong_FromUnsignedLongLong(kvfs_lease_page_heartbeat_ns(&self->page));
    else
        result = PyBool_FromLong(kvfs_lease_page_is_revoked(&self->page));
    page_leave(self, kvfs_leave(&self->life));
    return result;
}

static uint64_t place_of(const uint8_t *raw)
{
    struct kvfs_record record;
    memcpy(&record, raw, sizeof record);
    return record.length == 0 ? 0
                              : (uint64_t)(record.device & 0xff) << 56 |
                                    (uint64_t)(record.segment & 0xffffff) << 32 |
                                    record.generation;
}

/* Hold the places of records. REQUIRES: entered. */
static PyObject *hold(LeasePage *self, const uint8_t *records, size_t count)
{
    uint64_t *places = malloc(count * sizeof *places + 1);
    if (places == NULL)
        return PyErr_NoMemory();
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t place = place_of(records + i * KVFS_RECORD_BYTES);
        if (place != 0 && (used == 0 || places[used - 1] != place))
            places[used++] = place;
    }
    int status = kvfs_lease_page_hold(&self->page, places, used);
    PyObject *result =
        status == 0 ? PyBytes_FromStringAndSize((const char *)places,
                                                (Py_ssize_t)(used * sizeof *places))
                    : kvfs_raise(status);
    if (status == 0 && result == NULL)
        kvfs_lease_page_release(&self->page, places, used);
    free(places);
    return result;
}

static PyObject *page_hold(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"records", NULL};
    LeasePage *self = (LeasePage *)object;
    PyObject *records_object, *result = NULL;
    struct kvfs_views views = {0};
    size_t count;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &records_object) ||
        !kvfs_enter(&self->life, "lease page"))
        return NULL;
    Py_buffer *records = kvfs_take(&views, records_object, false);
    if (records != NULL && kvfs_count_items(records, "records", KVFS_RECORD_BYTES, &count))
        result = hold(self, records->buf, count);
    kvfs_release(&views);
    page_leave(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *page_release(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"places", NULL};
    LeasePage *self = (LeasePage *)object;
    PyObject *places_object, *result = NULL;
    size_t count;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "S", names, &places_object) ||
        !kvfs_enter(&self->life, "lease page"))
        return NULL;
    struct kvfs_views views = {0};
    Py_buffer *places = kvfs_take(&views, places_object, false);
    if (places != NULL && kvfs_count_items(places, "places", sizeof(uint64_t), &count)) {
        /* The content of a bytes object is aligned to 16 or 8 bytes, never less than 8. */
        uint64_t *copy = malloc(count * sizeof *copy + 1);
        if (copy != NULL) {
            memcpy(copy, places->buf, count * sizeof *copy);
            kvfs_lease_page_release(&self->page, copy, count);
            free(copy);
            result = Py_NewRef(Py_None);
        } else {
            PyErr_NoMemory();
        }
    }
    kvfs_release(&views);
    page_leave(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *page_is_held(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"place", NULL};
    LeasePage *self = (LeasePage *)object;
    PyObject *place_object;
    uint64_t place;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &place_object) ||
        !kvfs_parse_u64(place_object, "place", 1, UINT64_MAX, &place) ||
        !kvfs_enter(&self->life, "lease page"))
        return NULL;
    bool is_held = kvfs_lease_page_is_held(&self->page, place);
    page_leave(self, kvfs_leave(&self->life));
    return PyBool_FromLong(is_held);
}

static PyObject *page_places(PyObject *object, PyObject *args)
{
    LeasePage *self = (LeasePage *)object;
    (void)args;
    if (!kvfs_enter(&self->life, "lease page"))
        return NULL;
    size_t room = self->page.slot_count;
    uint64_t *places = malloc(room * sizeof *places);
    PyObject *result = NULL;
    if (places == NULL) {
        PyErr_NoMemory();
    } else {
        size_t found = kvfs_lease_page_places(&self->page, places, room);
        if (found > room)
            found = room;
        result = PyBytes_FromStringAndSize((const char *)places,
                                           (Py_ssize_t)(found * sizeof *places));
        free(places);
    }
    page_leave(self, kvfs_leave(&self->life));
    return result;
}

/* Call what the owner alone may do. */
static PyObject *as_owner(LeasePage *self, void (*done)(struct kvfs_lease_page *))
{
    if (!kvfs_enter(&self->life, "lease page"))
        return NULL;
    bool is_client = self->page.is_client;
    if (!is_client)
        done(&self->page);
    page_leave(self, kvfs_leave(&self->life));
    if (is_client)
        return kvfs_raise(-EROFS);
    Py_RETURN_NONE;
}

static PyObject *page_revoke(PyObject *object, PyObject *args)
{
    (void)args;
    return as_owner((LeasePage *)object, kvfs_lease_page_revoke);
}

static PyObject *page_note_freed(PyObject *object, PyObject *args)
{
    (void)args;
    return as_owner((LeasePage *)object, kvfs_lease_page_note_freed);
}

static PyObject *page_beat(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"interval_ms", NULL};
    LeasePage *self = (LeasePage *)object;
    PyObject *interval_object;
    uint64_t interval_ms;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &interval_object) ||
        !kvfs_parse_u64(interval_object, "interval_ms", 1, 3600000, &interval_ms) ||
        !kvfs_enter(&self->life, "lease page"))
        return NULL;
    int status = kvfs_lease_page_beat(&self->page, (uint32_t)interval_ms);
    page_leave(self, kvfs_leave(&self->life));
    if (status != 0)
        return kvfs_raise(status);
    Py_RETURN_NONE;
}

#define METHOD(name, more) \
    {#name, (PyCFunction)(void (*)(void))page_##name, METH_VARARGS | METH_KEYWORDS | (more), NULL}

static PyMethodDef methods[] = {
    METHOD(attach, METH_CLASS),
    METHOD(hold, 0),
    METHOD(release, 0),
    METHOD(is_held, 0),
    METHOD(beat, 0),
    {"places", page_places, METH_NOARGS, NULL},
    {"revoke", page_revoke, METH_NOARGS, NULL},
    {"note_freed", page_note_freed, METH_NOARGS, NULL},
    {"close", page_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"fd", page_get, NULL, NULL, (void *)(uintptr_t)"fd"},
    {"notice_fd", page_get, NULL, NULL, (void *)(uintptr_t)"notice_fd"},
    {"segments_freed", page_get, NULL, NULL, (void *)(uintptr_t)"segments_freed"},
    {"heartbeat_ns", page_get, NULL, NULL, (void *)(uintptr_t)"heartbeat_ns"},
    {"is_revoked", page_get, NULL, NULL, (void *)(uintptr_t)"is_revoked"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)page_new},
    {Py_tp_dealloc, (void *)page_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvfs._native.LeasePage",
    .basicsize = sizeof(LeasePage),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

bool kvfs_add_lease_page(PyObject *module)
{
    return kvfs_add_type(module, &spec);
}
