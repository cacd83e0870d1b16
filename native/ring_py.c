/* kvfs._native.AccessRing: the ring as a Python type. */
#include "pyutil.h"

#include "ring.h"
#include "table.h"

#include <errno.h>
#include <stdlib.h>

typedef struct {
    PyObject_HEAD
    struct kvfs_life life;
    struct kvfs_ring ring;
} Ring;

static void ring_release(Ring *self, bool is_last)
{
    if (is_last)
        kvfs_ring_destroy(&self->ring);
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"capacity", NULL};
    PyObject *capacity_object;
    uint64_t capacity;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &capacity_object) ||
        !kvfs_parse_u64(capacity_object, "capacity", 1, KVFS_RING_CAPACITY_MAX, &capacity))
        return NULL;
    Ring *self = (Ring *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    int status = kvfs_ring_create(&self->ring, capacity);
    return kvfs_opened((PyObject *)self, &self->life, status, NULL, NULL);
}

static PyObject *ring_attach(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", NULL};
    const char *reason = NULL;
    int fd;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i", names, &fd))
        return NULL;
    Ring *self = (Ring *)kvfs_alloc((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    int status = kvfs_ring_attach(&self->ring, fd, &reason);
    return kvfs_opened((PyObject *)self, &self->life, status, "an access ring", reason);
}

static void ring_dealloc(PyObject *object)
{
    Ring *self = (Ring *)object;
    ring_release(self, kvfs_shut(&self->life));
    kvfs_free(object);
}

static PyObject *ring_close(PyObject *object, PyObject *args)
{
    Ring *self = (Ring *)object;
    (void)args;
    ring_release(self, kvfs_shut(&self->life));
    Py_RETURN_NONE;
}

static PyObject *ring_get(PyObject *object, void *closure)
{
    Ring *self = (Ring *)object;
    const char *what = closure;
    if (!kvfs_enter(&self->life, "access ring"))
        return NULL;
    PyObject *result;
    if (what[0] == 'f')
        result = PyLong_FromLong(self->ring.fd);
    else
        result = PyLong_FromUnsignedLongLong(kvfs_ring_lost(&self->ring));
    ring_release(self, kvfs_leave(&self->life));
    return result;
}

static PyObject *ring_push(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"records", "phase", "tag", NULL};
    Ring *self = (Ring *)object;
    PyObject *records_object, *phase_object = NULL, *tag_object = NULL;
    uint64_t phase = 0, tag = 0;
    struct kvfs_views views = {0};
    size_t count;
    bool done = false;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO", names, &records_object, &phase_object,
                                     &tag_object) ||
        (phase_object != NULL && !kvfs_parse_u64(phase_object, "phase", 0, UINT8_MAX, &phase)) ||
        (tag_object != NULL && !kvfs_parse_u64(tag_object, "tag", 0, UINT32_MAX, &tag)) ||
        !kvfs_enter(&self->life, "access ring"))
        return NULL;
    Py_buffer *records = kvfs_take(&views, records_object, false);
    if (records != NULL && kvfs_count_items(records, "records", KVFS_RECORD_BYTES, &count)) {
        Py_BEGIN_ALLOW_THREADS
        kvfs_ring_push(&self->ring, records->buf, count, (uint8_t)phase, (uint32_t)tag);
        Py_END_ALLOW_THREADS
        done = true;
    }
    kvfs_release(&views);
    ring_release(self, kvfs_leave(&self->life));
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

/* Drain at most limit events into fresh memory. REQUIRES: entered. */
static PyObject *drain(Ring *self, size_t limit)
{
    size_t fill = kvfs_ring_fill(&self->ring);
    size_t room = fill < limit ? fill : limit;
    uint8_t *events = malloc(room * KVFS_EVENT_BYTES + 1);
    if (events == NULL)
        return PyErr_NoMemory();
    size_t taken;
    Py_BEGIN_ALLOW_THREADS
    taken = kvfs_ring_drain(&self->ring, events, room);
    Py_END_ALLOW_THREADS
    PyObject *result =
        PyBytes_FromStringAndSize((const char *)events, (Py_ssize_t)(taken * KVFS_EVENT_BYTES));
    free(events);
    return result;
}

static PyObject *ring_drain(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"limit", NULL};
    Ring *self = (Ring *)object;
    PyObject *limit_object = NULL;
    uint64_t limit = 65536;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &limit_object) ||
        (limit_object != NULL &&
         !kvfs_parse_u64(limit_object, "limit", 0, UINT64_MAX, &limit)) ||
        !kvfs_enter(&self->life, "access ring"))
        return NULL;
    PyObject *result = drain(self, (size_t)limit);
    ring_release(self, kvfs_leave(&self->life));
    return result;
}

#define METHOD(name, more) \
    {#name, (PyCFunction)(void (*)(void))ring_##name, METH_VARARGS | METH_KEYWORDS | (more), NULL}

static PyMethodDef methods[] = {
    METHOD(attach, METH_CLASS),
    METHOD(push, 0),
    METHOD(drain, 0),
    {"close", ring_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"fd", ring_get, NULL, NULL, (void *)(uintptr_t)"fd"},
    {"lost", ring_get, NULL, NULL, (void *)(uintptr_t)"lost"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)ring_new},
    {Py_tp_dealloc, (void *)ring_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvfs._native.AccessRing",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

bool kvfs_add_ring(PyObject *module)
{
    return kvfs_add_type(module, &spec);
}
