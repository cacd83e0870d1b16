/* kvfs._native.IOQueue: a queue of transfers as a Python type. */
#include "batch_py.h"

#include "io_batch.h"

#include <errno.h>
#include <string.h>

#define PAD_MAX ((uint64_t)1 << 40)

typedef struct {
    PyObject_HEAD
    struct kvfs_life life;
    struct kvfs_io_queue *queue;
    unsigned depth;
    bool is_busy;
} Queue;

static bool parse_kind(const char *name, enum kvfs_io_kind *kind)
{
    *kind = KVFS_IO_ANY;
    if (name != NULL && strcmp(name, "io_uring") == 0)
        *kind = KVFS_IO_URING;
    else if (name != NULL && strcmp(name, "threads") == 0)
        *kind = KVFS_IO_THREADS;
    else if (name != NULL) {
        PyErr_Format(PyExc_ValueError, "kind: expected io_uring or threads, found %s", name);
        return false;
    }
    return true;
}

static PyObject *queue_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"depth", "kind", NULL};
    PyObject *depth_object;
    uint64_t depth;
    const char *name = NULL;
    enum kvfs_io_kind kind;
    int status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|z", names, &depth_object, &name) ||
        !kvfs_parse_u64(depth_object, "depth", 1, KVFS_IO_DEPTH_MAX, &depth) ||
        !parse_kind(name, &kind))
        return NULL;
    Queue *self = (Queue *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    self->depth = (unsigned)depth;
    Py_BEGIN_ALLOW_THREADS
    status = kvfs_io_queue_open(self->depth, kind, &self->queue);
    Py_END_ALLOW_THREADS
    return kvfs_opened((PyObject *)self, &self->life, status, "queue", NULL);
}

static void free_queue(Queue *self)
{
    struct kvfs_io_queue *queue = self->queue;
    self->queue = NULL;
    if (queue == NULL)
        return;
    Py_BEGIN_ALLOW_THREADS
    kvfs_io_queue_close(queue);
    Py_END_ALLOW_THREADS
}

static void queue_dealloc(PyObject *object)
{
    free_queue((Queue *)object);
    kvfs_free(object);
}

static PyObject *queue_close(PyObject *object, PyObject *args)
{
    Queue *self = (Queue *)object;
    (void)args;
    if (kvfs_shut(&self->life))
        free_queue(self);
    Py_RETURN_NONE;
}

/* Begin a call; RuntimeError while another thread is in one. */
static bool enter(Queue *self)
{
    if (self->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "queue is in use by another thread");
        return false;
    }
    self->is_busy = kvfs_enter(&self->life, "queue");
    return self->is_busy;
}

static void leave(Queue *self)
{
    self->is_busy = false;
    if (kvfs_leave(&self->life))
        free_queue(self);
}

static PyObject *queue_write_hash(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd",     "offsets", "sources",    "lengths", "digests", "statuses",
                            "pad_to", "flags",   "timeout_ms", NULL};
    Queue *self = (Queue *)object;
    PyObject *offsets, *sources, *lengths, *digests, *statuses, *pad = NULL;
    struct kvfs_views views = {0};
    struct kvfs_write_batch batch = {.pad_to = 1};
    struct kvfs_io_manner manner = {.timeout_ms = -1, .align = 1, .address_align = 1};
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOOOO|Oii", names, &batch.fd, &offsets,
                                     &sources, &lengths, &digests, &statuses, &pad, &manner.flags,
                                     &manner.timeout_ms) ||
        (pad != NULL && !kvfs_parse_u64(pad, "pad_to", 1, PAD_MAX, &batch.pad_to)))
        return NULL;
    if ((batch.lengths = take_first(&views, lengths, "lengths", 8, &batch.count, false)) != NULL &&
        (batch.offsets = take(&views, offsets, "offsets", 8, batch.count, false)) != NULL &&
        (batch.sources = take(&views, sources, "sources", 8, batch.count, false)) != NULL &&
        (batch.digests = take(&views, digests, "digests", 16, batch.count, true)) != NULL &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard() && enter(self)) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_io_write_hash(self->queue, &batch, &manner);
        Py_END_ALLOW_THREADS
        leave(self);
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static bool parse_align(PyObject *object, const char *name, uint32_t *align)
{
    uint64_t value = 1;
    if (object != NULL && !kvfs_parse_u64(object, name, 1, 4096, &value))
        return false;
    if ((value & (value - 1)) != 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected a power of two", name);
        return false;
    }
    *align = (uint32_t)value;
    return true;
}

static PyObject *queue_read_verify(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fds",      "offsets", "lengths", "targets",    "digests",
                            "statuses", "align",   "address_align", "flags", "timeout_ms",
                            NULL};
    Queue *self = (Queue *)object;
    PyObject *fds, *offsets, *lengths, *targets, *digests, *statuses, *align = NULL;
    PyObject *address_align = NULL;
    struct kvfs_views views = {0};
    struct kvfs_read_batch batch = {0};
    struct kvfs_io_manner manner = {.timeout_ms = -1};
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO|OOii", names, &fds, &offsets, &lengths,
                                     &targets, &digests, &statuses, &align, &address_align,
                                     &manner.flags, &manner.timeout_ms) ||
        !parse_align(align, "align", &manner.align) ||
        !parse_align(address_align, "address_align", &manner.address_align))
        return NULL;
    if ((batch.lengths = take_first(&views, lengths, "lengths", 8, &batch.count, false)) != NULL &&
        (batch.fds = take(&views, fds, "fds", 4, batch.count, false)) != NULL &&
        (batch.offsets = take(&views, offsets, "offsets", 8, batch.count, false)) != NULL &&
        (batch.targets = take(&views, targets, "targets", 8, batch.count, false)) != NULL &&
        (Py_IsNone(digests) ||
         (batch.digests = take(&views, digests, "digests", 16, batch.count, false)) != NULL) &&
        (batch.statuses = take(&views, statuses, "statuses", 4, batch.count, true)) != NULL &&
        kvfs_need_guard() && enter(self)) {
        size_t failed;
        Py_BEGIN_ALLOW_THREADS
        failed = kvfs_io_read_verify(self->queue, &batch, &manner);
        Py_END_ALLOW_THREADS
        leave(self);
        result = PyLong_FromSize_t(failed);
    }
    kvfs_release(&views);
    return result;
}

static PyObject *queue_stalled(PyObject *object, PyObject *args)
{
    Queue *self = (Queue *)object;
    (void)args;
    if (!enter(self))
        return NULL;
    unsigned stalled = kvfs_io_queue_stalled(self->queue);
    leave(self);
    return PyLong_FromUnsignedLong(stalled);
}

static PyObject *get_kind(PyObject *object, void *closure)
{
    const Queue *self = (Queue *)object;
    (void)closure;
    if (self->queue == NULL)
        return kvfs_raise(-EBADF);
    bool is_ring = kvfs_io_queue_kind(self->queue) == KVFS_IO_URING;
    return PyUnicode_FromString(is_ring ? "io_uring" : "threads");
}

static PyObject *get_depth(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLong(((Queue *)object)->depth);
}

static PyObject *get_is_registered(PyObject *object, void *closure)
{
    const Queue *self = (Queue *)object;
    (void)closure;
    return PyBool_FromLong(self->queue != NULL && kvfs_io_queue_is_registered(self->queue));
}

static PyMethodDef methods[] = {
    {"write_hash", (PyCFunction)(void (*)(void))queue_write_hash, METH_VARARGS | METH_KEYWORDS,
     NULL},
    {"read_verify", (PyCFunction)(void (*)(void))queue_read_verify, METH_VARARGS | METH_KEYWORDS,
     NULL},
    {"stalled", queue_stalled, METH_NOARGS, NULL},
    {"close", queue_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"kind", get_kind, NULL, NULL, NULL},
    {"depth", get_depth, NULL, NULL, NULL},
    {"is_registered", get_is_registered, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)queue_new},
    {Py_tp_dealloc, (void *)queue_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvfs._native.IOQueue",
    .basicsize = sizeof(Queue),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

bool kvfs_add_io_queue(PyObject *module)
{
    return kvfs_add_type(module, &spec);
}
