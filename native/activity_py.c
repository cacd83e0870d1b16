/* kvfs._native.Gate, Operation, Histogram: operations under way are counted, and timed on the way.
 *
 * All of it happens under the GIL, which is the lock: between two calls into the interpreter no
 * other thread comes in between. What is rare is the owner's (kvfs.engine.activity), in Python. */
#include "pyutil.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

enum { BUCKETS = 64, SKIP = 15 };

/* Calls that took less are timed one time in SKIP + 1: two looks at the clock are a part of them
 * that can be seen. */
#define SHORT_NS (UINT64_C(1) << 14)

static unsigned forks; /* of this process's ancestors, with this module loaded */

static void note_fork(void)
{
    forks++;
}

/* --- Histogram */

/* owed: calls since the one timed last, which took last_ns; they are taken for as long as the next
 * one that is timed. skip: how many more are not timed. */
typedef struct {
    PyObject_HEAD
    uint64_t counts[BUCKETS];
    uint64_t sum_ns;
    uint64_t last_ns;
    uint32_t owed;
    uint32_t skip;
} Histogram;

static void add_times(Histogram *self, uint64_t took_ns, uint64_t weight)
{
    int bits = took_ns == 0 ? 0 : 64 - __builtin_clzll(took_ns);
    self->counts[bits < BUCKETS ? bits : BUCKETS - 1] += weight;
    self->sum_ns += took_ns * weight;
}

/* Before anybody looks, what is owed is counted as what was timed last. */
static void settle(Histogram *self)
{
    add_times(self, self->last_ns, self->owed);
    self->owed = 0;
}

static void note_timed(Histogram *self, uint64_t took_ns)
{
    add_times(self, took_ns, (uint64_t)self->owed + 1);
    self->owed = 0;
    self->last_ns = took_ns;
    self->skip = took_ns < SHORT_NS ? SKIP : 0;
}

static bool wants_time(Histogram *self)
{
    if (self->skip == 0)
        return true;
    self->skip--;
    self->owed++;
    return false;
}

static void histogram_dealloc(PyObject *object)
{
    kvfs_free(object);
}

static PyObject *histogram_note(PyObject *object, PyObject *took)
{
    uint64_t took_ns;
    if (!kvfs_parse_u64(took, "nanoseconds", 0, INT64_MAX, &took_ns))
        return NULL;
    add_times((Histogram *)object, took_ns, 1);
    Py_RETURN_NONE;
}

static PyObject *histogram_add(PyObject *object, PyObject *other_object)
{
    Histogram *self = (Histogram *)object, *other = (Histogram *)other_object;
    if (Py_TYPE(object) != Py_TYPE(other_object)) {
        PyErr_SetString(PyExc_TypeError, "a histogram adds a histogram");
        return NULL;
    }
    settle(self);
    settle(other);
    for (int i = 0; i < BUCKETS; i++)
        self->counts[i] += other->counts[i];
    self->sum_ns += other->sum_ns;
    Py_RETURN_NONE;
}

static PyObject *histogram_counts(PyObject *object, void *closure)
{
    Histogram *self = (Histogram *)object;
    (void)closure;
    settle(self);
    PyObject *list = PyList_New(BUCKETS);
    for (int i = 0; list != NULL && i < BUCKETS; i++) {
        PyObject *count = PyLong_FromUnsignedLongLong(self->counts[i]);
        if (count == NULL || PyList_SetItem(list, i, count) != 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *histogram_count(PyObject *object, void *closure)
{
    const Histogram *self = (const Histogram *)object;
    uint64_t sum = self->owed;
    (void)closure;
    for (int i = 0; i < BUCKETS; i++)
        sum += self->counts[i];
    return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *histogram_sum(PyObject *object, void *closure)
{
    (void)closure;
    settle((Histogram *)object);
    return PyLong_FromUnsignedLongLong(((Histogram *)object)->sum_ns);
}

static PyMethodDef histogram_methods[] = {
    {"note", histogram_note, METH_O, NULL},
    {"add", histogram_add, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef histogram_getters[] = {
    {"counts", histogram_counts, NULL, NULL, NULL},
    {"count", histogram_count, NULL, NULL, NULL},
    {"sum_ns", histogram_sum, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot histogram_slots[] = {
    {Py_tp_dealloc, (void *)histogram_dealloc},
    {Py_tp_methods, histogram_methods},
    {Py_tp_getset, histogram_getters},
    {0, NULL},
};

static PyType_Spec histogram_spec = {
    .name = "kvfs._native.Histogram",
    .basicsize = sizeof(Histogram),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = histogram_slots,
};

/* --- Gate */

typedef struct {
    PyObject_HEAD
    PyObject *running; /* dict: namespace -> operations under way, never 0 */
    PyObject *ended;   /* set of namespaces */
    PyObject *now;     /* a clock, or NULL for CLOCK_MONOTONIC */
    PyObject *refuse;  /* called with a namespace, raises why it is refused */
    PyObject *wake;    /* called when the last operation on a namespace ends and somebody waits */
    unsigned forks;
    unsigned waiters;
    bool is_closed;
} Gate;

typedef struct {
    PyObject_HEAD
    Gate *gate;
    PyObject *space;
    Histogram *histogram; /* or NULL */
    uint64_t begin_ns;
    bool is_timed;
    bool is_under_way;
} Operation;

static PyTypeObject *operation_type, *histogram_type;

static bool read_clock(const Gate *gate, uint64_t *now_ns)
{
    struct timespec now;
    if (gate->now != NULL) {
        PyObject *value = PyObject_CallNoArgs(gate->now);
        if (value == NULL)
            return false;
        *now_ns = PyLong_AsUnsignedLongLong(value);
        Py_DECREF(value);
        return !PyErr_Occurred();
    }
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    *now_ns = (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
    return true;
}

static PyObject *gate_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"now", "refuse", "wake", NULL};
    PyObject *now, *refuse, *wake;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &now, &refuse, &wake))
        return NULL;
    Gate *self = (Gate *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    self->running = PyDict_New();
    self->ended = PySet_New(NULL);
    self->now = Py_IsNone(now) ? NULL : Py_NewRef(now);
    self->refuse = Py_NewRef(refuse);
    self->wake = Py_NewRef(wake);
    self->forks = forks;
    if (self->running == NULL || self->ended == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int gate_traverse(PyObject *object, visitproc visit, void *arg)
{
    Gate *self = (Gate *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->running);
    Py_VISIT(self->ended);
    Py_VISIT(self->now);
    Py_VISIT(self->refuse);
    Py_VISIT(self->wake);
    return 0;
}

static int gate_clear(PyObject *object)
{
    Gate *self = (Gate *)object;
    Py_CLEAR(self->running);
    Py_CLEAR(self->ended);
    Py_CLEAR(self->now);
    Py_CLEAR(self->refuse);
    Py_CLEAR(self->wake);
    return 0;
}

static void gate_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    (void)gate_clear(object);
    kvfs_free(object);
}

/* Make an Operation; see _native.pyi. */
static PyObject *gate_during(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    PyObject *histogram = count > 1 ? args[1] : Py_None;
    if (count < 1 || count > 2 || !PyLong_Check(args[0]) ||
        !(Py_IsNone(histogram) || Py_IS_TYPE(histogram, histogram_type))) {
        PyErr_SetString(PyExc_TypeError, "expected a namespace, and a histogram or None");
        return NULL;
    }
    Operation *operation = (Operation *)kvfs_alloc(operation_type);
    if (operation == NULL)
        return NULL;
    operation->gate = (Gate *)Py_NewRef(object);
    operation->space = Py_NewRef(args[0]);
    operation->histogram =
        Py_IsNone(histogram) ? NULL : (Histogram *)Py_NewRef(histogram);
    return (PyObject *)operation;
}

/* Raise what `refuse` raises. */
static bool check(const Gate *self, PyObject *space)
{
    int is_ended = PySet_Contains(self->ended, space);
    if (is_ended < 0)
        return false;
    if (!self->is_closed && !is_ended && self->forks == forks)
        return true;
    PyObject *result = PyObject_CallFunctionObjArgs(self->refuse, space, NULL);
    if (result != NULL) {
        Py_DECREF(result);
        PyErr_SetString(PyExc_RuntimeError, "a gate that is closed lets nobody in");
    }
    return false;
}

/* Change how many operations on a namespace are under way; returns the new number, or -1. */
static long change_running(Gate *self, PyObject *space, long by)
{
    PyObject *found = PyDict_GetItemWithError(self->running, space);
    if (found == NULL && PyErr_Occurred())
        return -1;
    long count = (found == NULL ? 0 : PyLong_AsLong(found)) + by;
    int status;
    if (count == 0) {
        status = PyDict_DelItem(self->running, space);
    } else {
        PyObject *value = PyLong_FromLong(count);
        status = value == NULL ? -1 : PyDict_SetItem(self->running, space, value);
        Py_XDECREF(value);
    }
    return status == 0 ? count : -1;
}

static PyObject *gate_require(PyObject *object, PyObject *space)
{
    if (!check((Gate *)object, space))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *gate_running(PyObject *object, PyObject *args)
{
    PyObject *space = NULL;
    Gate *self = (Gate *)object;
    if (!PyArg_ParseTuple(args, "|O", &space))
        return NULL;
    long sum = 0;
    if (space != NULL) {
        PyObject *found = PyDict_GetItemWithError(self->running, space);
        if (found == NULL && PyErr_Occurred())
            return NULL;
        sum = found == NULL ? 0 : PyLong_AsLong(found);
    } else {
        Py_ssize_t at = 0;
        PyObject *key, *value;
        while (PyDict_Next(self->running, &at, &key, &value))
            sum += PyLong_AsLong(value);
    }
    return PyLong_FromLong(sum);
}

static PyObject *gate_end(PyObject *object, PyObject *space)
{
    if (PySet_Add(((Gate *)object)->ended, space) != 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *gate_close(PyObject *object, PyObject *args)
{
    (void)args;
    ((Gate *)object)->is_closed = true;
    Py_RETURN_NONE;
}

static PyObject *gate_wait(PyObject *object, PyObject *by_object)
{
    long by = PyLong_AsLong(by_object);
    if (by == -1 && PyErr_Occurred())
        return NULL;
    ((Gate *)object)->waiters += (unsigned)by;
    Py_RETURN_NONE;
}

static PyObject *gate_is_forked(PyObject *object, void *closure)
{
    (void)closure;
    return PyBool_FromLong(((Gate *)object)->forks != forks);
}

static PyMethodDef gate_methods[] = {
    {"during", (PyCFunction)(void (*)(void))gate_during, METH_FASTCALL, NULL},
    {"require", gate_require, METH_O, NULL},
    {"running", gate_running, METH_VARARGS, NULL},
    {"end", gate_end, METH_O, NULL},
    {"close", gate_close, METH_NOARGS, NULL},
    {"wait", gate_wait, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef gate_getters[] = {
    {"is_forked", gate_is_forked, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot gate_slots[] = {
    {Py_tp_new, (void *)gate_new},
    {Py_tp_dealloc, (void *)gate_dealloc},
    {Py_tp_traverse, (void *)gate_traverse},
    {Py_tp_clear, (void *)gate_clear},
    {Py_tp_methods, gate_methods},
    {Py_tp_getset, gate_getters},
    {0, NULL},
};

static PyType_Spec gate_spec = {
    .name = "kvfs._native.Gate",
    .basicsize = sizeof(Gate),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = gate_slots,
};

/* --- Operation */

static void operation_dealloc(PyObject *object)
{
    Operation *self = (Operation *)object;
    Py_CLEAR(self->gate);
    Py_CLEAR(self->space);
    Py_CLEAR(self->histogram);
    kvfs_free(object);
}

static PyObject *operation_enter(PyObject *object, PyObject *args)
{
    Operation *self = (Operation *)object;
    (void)args;
    if (!check(self->gate, self->space))
        return NULL;
    self->is_timed = self->histogram != NULL && wants_time(self->histogram);
    if (self->is_timed && !read_clock(self->gate, &self->begin_ns))
        return NULL;
    if (change_running(self->gate, self->space, 1) < 0)
        return NULL;
    self->is_under_way = true;
    Py_RETURN_NONE;
}

static PyObject *operation_exit(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    Operation *self = (Operation *)object;
    uint64_t end_ns;
    (void)args, (void)count;
    if (!self->is_under_way)
        Py_RETURN_FALSE;
    self->is_under_way = false;
    bool is_read = !self->is_timed || read_clock(self->gate, &end_ns);
    if (self->is_timed && is_read)
        note_timed(self->histogram, end_ns - self->begin_ns);
    long left = change_running(self->gate, self->space, -1);
    if (left < 0 || !is_read)
        return NULL;
    if (left == 0 && self->gate->waiters > 0) {
        PyObject *result = PyObject_CallNoArgs(self->gate->wake);
        if (result == NULL)
            return NULL;
        Py_DECREF(result);
    }
    Py_RETURN_FALSE;
}

static PyMethodDef operation_methods[] = {
    {"__enter__", operation_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))operation_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot operation_slots[] = {
    {Py_tp_dealloc, (void *)operation_dealloc},
    {Py_tp_methods, operation_methods},
    {0, NULL},
};

static PyType_Spec operation_spec = {
    .name = "kvfs._native.Operation",
    .basicsize = sizeof(Operation),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = operation_slots,
};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec, const char *name)
{
    if (!kvfs_add_type(module, spec))
        return NULL;
    return (PyTypeObject *)PyObject_GetAttrString(module, name);
}

bool kvfs_add_activity(PyObject *module)
{
    static bool is_watching;
    if (!is_watching && pthread_atfork(NULL, NULL, note_fork) != 0) {
        PyErr_NoMemory();
        return false;
    }
    is_watching = true;
    histogram_type = add_type(module, &histogram_spec, "Histogram");
    operation_type = add_type(module, &operation_spec, "Operation");
    return histogram_type != NULL && operation_type != NULL &&
           kvfs_add_type(module, &gate_spec);
}
